"""Doctor's self-test: every kernel against its own definition on this machine, and how fast it is here."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.arrays import as_bytes, from_torch
from lorasurgery.errors import VerificationError
from lorasurgery.operations.diagnosis.peaks import peak

if TYPE_CHECKING:
    from torch import Tensor

# layers of this many rows and columns are timed
_SIDES = {"cpu": 1024, "cuda": 8192}
_SECONDS, _MOST, _LEAST = 0.05, 50, 3
_COPIED = 128 << 20
# sums in float32 against sums in float64; those of a kernel with a tolerance have their own
_SUMS = 1e-5
# sums in float64 in two orders, beside the largest of their kind
_MOMENTS = 1e-10


@dataclass(frozen=True, slots=True)
class Tested:
    """One kernel. The bytes of a second are those of arguments and results, each counted once."""

    name: str
    form: str  # numba, Triton or torch
    cases: int
    wrong: str | None  # the first case that is, and by how much
    seconds: float
    gb_per_s: float
    percent_of_peak: float


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was tried on which device."""

    device: str
    peak_gb_per_s: float
    peak_is: str  # the maker's word, or what a copy takes here
    kernels: tuple[Tested, ...]

    def refuse_wrong(self) -> None:
        """Raises VerificationError if any kernel is wrong."""
        wrong = [f"{kernel.name} ({kernel.wrong})" for kernel in self.kernels if kernel.wrong]
        if wrong:
            raise VerificationError(
                f"self-test: on {self.device}, {len(wrong)} of {len(self.kernels)} kernels are wrong: "
                f"{', '.join(wrong)}. Do not use them here, and report this with `doctor --json`."
            )


def self_test(advance: Callable[[str], None] = lambda _: None) -> SelfTest:
    """Run all kernels on the GPU where torch has one, else on the processor.

    Args:
        advance: told each kernel's name before it is tested.

    """
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.cuda.get_device_name() if kind == "cuda" else "the processor"
    said, tested = peak(device), []
    speed = said or _copying(kind)
    for name in plugins.names("kernels"):
        advance(name)
        tested.append(_test(name, plugins.load("kernels", name), kind, speed))
    return SelfTest(device, speed, "the maker's" if said else "of a copy here", tuple(tested))


def _copying(kind: str) -> float:
    """GB/s read and written by torch's copy of what no cache holds; what is in a cache may be faster."""
    import torch

    x = torch.zeros(_COPIED, dtype=torch.uint8, device=kind)
    y = torch.empty_like(x)
    return 2 * _COPIED / _seconds(lambda: y.copy_(x), kind) / 1e9


def _test(name: str, kernel: ModuleType, kind: str, peak_speed: float) -> Tested:
    import torch

    from lorasurgery.kernels._tuning import first

    rng = torch.Generator().manual_seed(0)
    count, wrong, largest = 0, None, ()
    for label, args in kernel.cases(rng):
        count += 1
        moved = _moved(args, kind)
        # configurations are measured for what is timed below, and not for each small shape
        with first():
            got = kernel.run(*moved)
        wrong = wrong or _difference(kernel, args, got, label)
        largest = max(largest, args, key=_bytes)
    sized = getattr(kernel, "sized", None)
    timed = _moved(sized(rng, _SIDES[kind]) if sized else largest, kind)
    seconds = _seconds(lambda: kernel.run(*timed), kind)
    speed = (_bytes(timed) + _bytes(kernel.run(*timed))) / seconds / 1e9
    share = 100 * speed / peak_speed
    return Tested(name, _form(kernel, kind), count, wrong, seconds, speed, share)


def _form(kernel: ModuleType, kind: str) -> str:
    fast, called = ("launch", "Triton") if kind == "cuda" else ("cpu", "numba")
    return called if hasattr(kernel, fast) else "torch"


def _seconds(call: Callable[[], object], kind: str) -> float:
    """The median; the first call compiles and is not counted."""
    import torch

    synchronize: Callable[[], None] = torch.cuda.synchronize
    wait = synchronize if kind == "cuda" else lambda: None
    call()
    wait()
    taken: list[float] = []
    while len(taken) < _LEAST or (sum(taken) < _SECONDS and len(taken) < _MOST):
        started = time.perf_counter()
        call()
        wait()
        taken.append(time.perf_counter() - started)
    return median(taken)


def _difference(kernel: ModuleType, args: tuple[Any, ...], got: Any, label: str) -> str | None:
    """What is wrong, None if nothing: bits where no tolerance is declared, floats to their sums'."""
    want = kernel.reference(*args)
    allowed = kernel.tolerance(*args) if hasattr(kernel, "tolerance") else None
    pairs = itertools.zip_longest(_flat(got), _flat(want), fillvalue=None)
    for i, (one, other) in enumerate(pairs):
        reason = _compared(one, other, allowed)
        if reason:
            return f"{label}, result {i + 1}: {reason}"
    return None


def _compared(got: Any, want: Any, allowed: Tensor | None) -> str | None:
    import torch

    if want is None:
        return "too many results"
    if isinstance(want, float):
        same = isinstance(got, float) and math.isclose(got, want, rel_tol=_SUMS, abs_tol=1e-30)
        return None if same else f"{got} instead of {want}"
    got = got.cpu() if isinstance(got, torch.Tensor) else got
    if not isinstance(got, torch.Tensor) or (got.dtype, got.shape) != (want.dtype, want.shape):
        return "another dtype or shape"
    if want.dtype == torch.float64 and want.numel():
        # sums whose terms may cancel, by columns
        allowed = _MOMENTS * want.abs().amax(dim=0).expand_as(want)
    if allowed is None:
        off = _bits_differ(got, want)
    else:
        # nan is within no tolerance
        off = ~((got.double() - want.double()).abs() <= allowed.double())
    return f"{int(off.sum())} of {off.numel()} differ" if off.any() else None


def _bits_differ(got: Tensor, want: Tensor) -> Tensor:
    """Element by element; one nan is as good as another."""
    import torch

    one, other = (as_bytes(from_torch(x)).reshape(-1, x.element_size()) for x in (got, want))
    return torch.from_numpy((one != other).any(axis=1)) & ~(got.isnan() & want.isnan()).flatten()


def _flat(result: Any) -> Iterator[Any]:
    yield from result if isinstance(result, (tuple, list)) else (result,)


def _moved(args: tuple[Any, ...], kind: str) -> tuple[Any, ...]:
    return tuple(a.to(kind) if hasattr(a, "is_cuda") else a for a in args)


def _bytes(data: Any) -> int:
    return sum(x.numel() * x.element_size() for x in _flat(data) if hasattr(x, "is_cuda"))
