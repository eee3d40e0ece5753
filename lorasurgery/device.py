"""Where kernels compute: on the processor, or on a GPU, to which arrays are copied tile by tile, and back.

A kernel's form for GPUs gives the bits of its form for processors, so an output does not depend on the choice.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from types import ModuleType

    import torch

_CPU_TILE = 1 << 20  # fits in a core's second-level cache, beside what is made of it
# what the calls around a launch take on the processor, a bus carries about a mebibyte in
_GPU_TILE = 16 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """The processor: kernels are called with arrays as they are."""

    name: str = "cpu"
    tile_bytes: int = _CPU_TILE  # of what an operation reads at a time

    def run(self, kernel: ModuleType, *args: Any) -> Any:
        """`kernel.run` of arrays and numpy's dtypes; what comes back are arrays, wherever it is computed."""
        return kernel.run(*args)


HOST = Device()


@dataclass(frozen=True, slots=True)
class Gpu(Device):
    """One that torch knows; a kernel that has no form for it stays on the processor."""

    tile_bytes: int = _GPU_TILE
    place: torch.device = field(kw_only=True)
    # one call at a time: Triton compiles once, and a configuration is measured undisturbed
    _turn: Lock = field(default_factory=Lock, repr=False, compare=False)

    def run(self, kernel: ModuleType, *args: Any) -> Any:
        """Raises UsageError where the GPU's memory does not suffice."""
        import torch

        if not hasattr(kernel, "launch"):
            return kernel.run(*args)
        staged = [self._staged(arg) for arg in args]
        try:
            with self._turn, self._current():
                found = kernel.run(*map(self._sent, staged))
                return tuple(map(_back, found)) if isinstance(found, tuple) else _back(found)
        except torch.OutOfMemoryError:
            raise UsageError(
                f"--device {self.name}: the GPU has no memory left for a tile of "
                f"{kernel.__name__.rpartition('.')[2]}. End what else runs there, pass --max-memory for "
                "smaller tiles, or leave --device out."
            ) from None

    def _staged(self, arg: Any) -> Any:
        """An array in memory that a GPU reads by itself: a checkpoint's own is mapped, and read-only."""
        import numpy as np
        import torch

        from lorasurgery.arrays import from_torch

        if isinstance(arg, np.dtype):
            return getattr(torch, arg.name)
        if not isinstance(arg, np.ndarray):
            return arg
        kind, pinned = getattr(torch, arg.dtype.name), self.place.type == "cuda"
        held = torch.empty(arg.shape, dtype=kind, pin_memory=pinned)
        np.copyto(from_torch(held), arg)
        return held

    def _current(self) -> AbstractContextManager[object]:
        """Triton launches on the GPU that is the thread's current one."""
        import torch

        return torch.cuda.device(self.place) if self.place.type == "cuda" else nullcontext()

    def _sent(self, staged: Any) -> Any:
        return staged.to(self.place, non_blocking=True) if hasattr(staged, "is_cuda") else staged


def _back(result: Any) -> Any:
    from lorasurgery.arrays import from_torch

    return from_torch(result.cpu()) if hasattr(result, "is_cuda") else result


def opened(name: str) -> Device:
    """`cpu`, `cuda`, or `cuda:N`; raises UsageError where it is none of these, or not here."""
    if name == "cpu":
        return HOST
    if not (asked := re.fullmatch(r"cuda(?::(\d+))?", name)):
        raise UsageError(
            f"--device {name}: unknown. Name cpu, cuda, or cuda:N for the GPU of that number."
        )
    import torch

    _check(name)
    count, index = torch.cuda.device_count(), int(asked[1] or 0)
    if index >= count:
        raise UsageError(
            f"--device {name}: there are {count} GPUs, and the last is cuda:{count - 1}. Name one of them."
        )
    return Gpu(f"cuda:{index}", place=torch.device("cuda", index))


def _check(name: str) -> None:
    """Raises UsageError, with what is missing, unless torch and Triton can use a GPU."""
    import torch

    built = torch.version.cuda or torch.version.hip
    if built is None:
        missing = f"torch {torch.__version__} is built without CUDA. Install a build that has it"
    elif not torch.cuda.is_available():
        missing = (
            f"torch {torch.__version__}, built for {built}, finds no GPU or no driver for it. See what "
            "nvidia-smi says"
        )
    elif find_spec("triton") is None:
        missing = "Triton is not installed. Install it"
    else:
        return
    raise UsageError(
        f"--device {name}: {missing}, or leave --device out: the processor writes the same bytes."
    )


__all__ = ["HOST", "Device", "Gpu", "opened"]
