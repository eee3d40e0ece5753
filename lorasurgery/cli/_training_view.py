"""What a training shows: on a terminal how it goes, at the end its curves and the optimizer's groups."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.cli._print import table
from lorasurgery.cli._sizes import show_bytes

if TYPE_CHECKING:
    from lorasurgery.training.method import Group
    from lorasurgery.training.options import Watch

_SEEN = 20  # steps that speed is told from


class Speed:
    """Of the last steps: an evaluation counts with the step after which it was made."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seen: deque[tuple[float, float]] = deque(maxlen=_SEEN)

    def add(self, told: Mapping[str, float]) -> None:
        # what an earlier process made is no work of this one's first step
        fresh = told["tokens"] - self._tokens if self._seen or told["step"] == 1 else 0.0
        self._tokens = told["tokens"]
        self._seen.append((fresh, told["seconds"]))

    @property
    def tokens(self) -> float:
        """A second, of those with a label."""
        known = [(tokens, seconds) for tokens, seconds in self._seen if tokens]
        return sum(t for t, _ in known) / (sum(s for _, s in known) or 1.0)

    def left(self, steps: float) -> float:
        """Seconds that so many steps will take."""
        return steps * sum(s for _, s in self._seen) / len(self._seen)


def line(told: Mapping[str, float], speed: Speed, memory: int) -> str:
    """What stands beside the bar."""
    rates = {name.removeprefix("rate."): v for name, v in told.items() if name.startswith("rate")}
    rate = "/".join(f"{v:.3g}" for v in dict.fromkeys(rates.values()))
    held = f"  held out {told['eval_loss']:.4f}" if "eval_loss" in told else ""
    return f"loss {told['loss']:.4f}{held}  rate {rate}  {speed.tokens:,.0f} tokens/s  {show_bytes(memory)}"


def clock(seconds: float) -> str:
    """0:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def memory() -> int:
    """The most bytes that were held so far: of the GPU where one is used, else of this process."""
    import torch

    if torch.cuda.is_available() and (held := torch.cuda.max_memory_allocated()):
        return held
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def beside() -> bool:
    """Whether this is one of torchrun's processes that say and write nothing."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and os.environ.get("RANK", "0") != "0"


@contextmanager
def training_view(*, quiet: bool) -> Iterator[Watch]:
    """Yields what a run calls after each step; nothing is shown with -q or without a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda _told, _steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    # rich itself looks at NO_COLOR and TERM=dumb
    columns = (TextColumn("{task.completed:.0f}/{task.total:.0f}"), BarColumn(20))
    text = TextColumn("{task.description}", markup=False)
    with Progress(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task, speed = bar.add_task("", total=0), Speed()

        def watch(told: Mapping[str, float], steps: int) -> None:
            speed.add(told)
            left = clock(speed.left(steps - told["step"]))
            said = f"{line(told, speed, memory())}  {left} left"
            bar.update(task, completed=told["step"], total=steps, description=said)

        yield watch


def draw_curves(output: Path, plot: Path | None) -> None:
    """The whole run, also what was made of it before it was resumed."""
    from lorasurgery.operations.inspecting import curves
    from lorasurgery.training.train import METRICS

    if plot or find_spec("matplotlib"):
        curves.draw(plot or output / "curves.png", curves.read(output / METRICS))


def explained(groups: Sequence[Group]) -> list[str]:
    """A row for each group."""
    rows = [
        [
            group.name, str(len(group.members)),
            str(sum(m.parameter.numel() for m in group.members)),
            f"{group.rate:g}", f"{group.decay:g}",
        ]
        for group in groups
    ]  # fmt: skip
    return table([["group", "tensors", "parameters", "learning rate", "weight decay"], *rows])
