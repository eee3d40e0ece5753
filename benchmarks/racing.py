"""A race: two commands or more, run by turns, each in a fresh process; and how two results are held to each other."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Run, run

PEERS = Path(__file__).with_name("peers")
OURS = (sys.executable, "-m", "lorasurgery")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the inputs lie, and how often each side runs."""

    base: Path
    adapter: Path
    dora: Path
    part: Path  # a smaller base, and its -tuned, -vera and -adalora, for peers that are slow
    scratch: Path
    repeats: int

    def of(self, kind: str) -> Path:
        """What goes with the smaller base."""
        return self.part.with_name(f"{self.part.name}-{kind}")

    @property
    def hidden(self) -> int:
        return int(json.loads((self.part / "config.json").read_text())["hidden_size"])

    @property
    def size(self) -> str:
        """Of the smaller base, in parameters of two bytes."""
        return f"{(self.part / 'model.safetensors').stat().st_size / 2e9:.2g} B parameters"


@dataclass(frozen=True, slots=True)
class Side:
    """One contender: all its samples."""

    name: str
    seconds: Sequence[float]
    peak_mib: Sequence[float] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float | None:
        return statistics.median(self.peak_mib) if self.peak_mib else None


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; the first side is ours."""

    name: str
    sides: tuple[Side, ...]

    def ratio(self, peer: Side) -> float:
        """How many times longer the peer takes."""
        return peer.median / self.sides[0].median


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to time; `output` is removed before each run."""

    name: str
    command: Sequence[str | Path]
    output: Path | None = None


def alternate(name: str, contenders: Sequence[Contender], repeats: int) -> Row:
    """A B A B ...: each in a fresh process, with what the one before it wrote flushed to disk."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            if contender.output:
                shutil.rmtree(contender.output, ignore_errors=True)
            os.sync()
            runs[contender.name].append(run(contender.command))
    return Row(
        name,
        tuple(
            Side(who, [r.seconds for r in of], [r.peak_mib for r in of]) for who, of in runs.items()
        ),
    )


def compare(contenders: Sequence[Contender], how: str) -> None:
    """No number on a wrong result."""
    ours, theirs = (c.output for c in contenders[:2])
    run((sys.executable, "-m", "benchmarks.compare", str(ours), str(theirs), how))
