"""A run's metrics as TensorBoard's event files, while it goes on, where the package tensorboard is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class Board:
    """Each number under its own name, at the step that it is of; `rate.B` is of the group rate."""

    def __init__(self, kind: Any, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        self._writer: Any = None

    def note(self, told: Mapping[str, float]) -> None:
        """One step's."""
        step = int(told["step"])
        if self._writer is None:
            # what an interrupted run wrote of steps that are made once more is not shown
            self._writer = self._kind(str(self._folder), purge_step=step)
        for name, value in told.items():
            if name != "step":
                self._writer.add_scalar(name.replace(".", "/"), value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def board(output: Path) -> Iterator[Board | None]:
    """In a folder of the output; None where there is no TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    made = Board(SummaryWriter, output / FOLDER)
    try:
        yield made
    finally:
        made.close()
