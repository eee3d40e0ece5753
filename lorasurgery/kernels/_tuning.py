"""Which configuration a launch takes: the fastest, measured once for a chip and a size and kept on disk.

Under the interpreter, without a GPU and while a graph is captured it is the first that is listed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

REPEATS = 7

Launch = Callable[["Config"], object]
Clock = Callable[[Callable[[], object]], float]

_TAKE: ContextVar[str] = ContextVar("take", default="fastest")


class Config(dict[str, int]):
    """The constants and options of one launch: sizes of tiles, num_warps, num_stages."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))


def every() -> AbstractContextManager[None]:
    """Within, each configuration is launched in turn: for who compiles them all, or tries them all."""
    return _taking("every")


def first() -> AbstractContextManager[None]:
    """Within, nothing is measured: for who tries many small shapes."""
    return _taking("first")


@contextmanager
def _taking(which: str) -> Iterator[None]:
    token = _TAKE.set(which)
    try:
        yield
    finally:
        _TAKE.reset(token)


def tuned(
    name: str, configs: Sequence[Config], data: Sequence[Tensor | Hashable], launch: Launch,
    trial: Launch | None = None,
) -> None:  # fmt: skip
    """Launch with the best of the configurations.

    Args:
        name: of the kernel.
        configs: of which the first is the one to take unmeasured.
        data: what the choice may depend on: tensors (by dtype, and size to a power of two), and facts.
        launch: writes the result; it may run several times, each over the last.
        trial: the same to somewhere else, where `launch` may run only once.

    """
    take = _TAKE.get()
    if take == "every":
        for config in configs:
            launch(config)
    elif take == "first":
        launch(configs[0])
    else:
        launch(_chosen(name, configs, data, trial or launch))


def of_32_threads(configs: Sequence[Config]) -> tuple[Config, ...]:
    """Where warps have 64 threads (AMD), half as many of them: a thread loads as many bytes of codes everywhere."""
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret or driver.active.get_current_target().warp_size == 32:
        return tuple(configs)
    return tuple(Config({**config, "num_warps": config["num_warps"] // 2}) for config in configs)


def over_blocks(config: Config, block: int) -> dict[str, int]:
    """WEIGHTS of a program as ROWS blocks of a matrix; one that has more weights brings as many more warps."""
    weights = config["WEIGHTS"]
    warps = config["num_warps"] * max(1, block // weights)
    return {"BLOCK": block, "ROWS": max(1, weights // block), "num_warps": warps}


def _chosen(name: str, configs: Sequence[Config], data: Sequence[Any], launch: Launch) -> Config:
    import torch
    import triton

    if len(configs) == 1 or triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return configs[0]
    chip = f"{torch.cuda.get_device_name()} triton {triton.__version__}"
    key = json.dumps([name, chip, configs, [_bucket(x) for x in data]])
    known = _known()
    if key not in known:
        file = place() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        found = read(file, key, configs)
        if found is None:
            if torch.cuda.is_current_stream_capturing():
                return configs[0]
            found = fastest(configs, launch, on_the_gpu)
            write(file, key, found)
        known[key] = found
    return known[key]


@cache
def _known() -> dict[str, Config]:
    """What this process has read or measured."""
    return {}


def _bucket(x: Any) -> Any:
    """Sizes up to the next power of two: who lies between two shares what was measured."""
    if hasattr(x, "dtype"):
        return [str(x.dtype), [1 << max(0, n - 1).bit_length() for n in x.shape]]
    return x


def place() -> Path:
    """Where measured choices are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "lorasurgery" / "tuning"


def read(file: Path, key: str, configs: Sequence[Config]) -> Config | None:
    """The choice in a file, if it is there, whole, and one of those that are listed."""
    try:
        kept = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(kept, dict) or kept.get("key") != key:
        return None
    return next((config for config in configs if config == kept.get("config")), None)


def write(file: Path, key: str, config: Config) -> None:
    """Keep a choice; where nothing can be written it is measured again next time."""
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"key": key, "config": config}))
        os.replace(part, file)


def fastest(configs: Sequence[Config], launch: Launch, clock: Clock) -> Config:
    """The one of least time; what a chip has no room for is passed over, but for the first."""
    from triton.runtime.errors import OutOfResources

    times: dict[Config, float] = {}
    for config in configs:
        with suppress(OutOfResources):
            times[config] = clock(lambda config=config: launch(config))  # type: ignore[misc]
    return min(times, key=times.__getitem__, default=configs[0])


def on_the_gpu(call: Callable[[], object]) -> float:
    """Median milliseconds by the GPU's own clock; the first call compiles and is not counted."""
    import torch

    event: Any = torch.cuda.Event
    call()
    taken = []
    for _ in range(REPEATS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return float(median(taken))
