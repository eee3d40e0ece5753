"""What a run leaves on the disk at each step: a line of metrics, an event for TensorBoard, now and then its state."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorasurgery.training import state
from lorasurgery.training.board import Board


@dataclass(frozen=True, slots=True)
class OnDisk:
    """What is on the disk of a run that goes on: a line for each step, and the last state."""

    metrics: BinaryIO
    saved: Path
    board: Board | None

    def begun(self) -> state.State | None:
        """Where an interrupted run is gone on with."""
        return state.load(self.saved) if self.saved.exists() else None

    def cut(self, size: int) -> None:
        """Take away the lines of steps that are made once more."""
        self.metrics.truncate(size)

    def note(self, told: Mapping[str, Any]) -> int:
        """One more line; the size of all."""
        self.metrics.write(json.dumps(told).encode() + b"\n")
        self.metrics.flush()
        if self.board:
            self.board.note(told)
        return self.metrics.tell()

    def save(self, captured: state.State) -> None:
        """The lines that it counts are on the disk before it is."""
        os.fsync(self.metrics.fileno())
        state.save(captured, self.saved)
