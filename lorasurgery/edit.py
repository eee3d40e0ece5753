"""An edit: one logical weight to be written, and the function that streams it, tile by tile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Any, Protocol

import blake3

from lorasurgery.arrays import Array, as_bytes
from lorasurgery.checkpoint import SCRATCH, Checkpoint
from lorasurgery.device import HOST, Device
from lorasurgery.errors import ShapeError
from lorasurgery.tensors import TensorInfo

Metrics = Mapping[str, float]

# mapped pages count as memory until they are given back
_RELEASE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Edit:
    """One logical weight: what will be written for it, and the function that streams it.

    `apply` reads through its step, appends to `targets`, and returns the numbers of the report;
    an edit without metrics is a plain copy.
    """

    name: str
    targets: tuple[TensorInfo, ...]
    apply: Callable[[Step], Metrics]


class Sink(Protocol):
    """Where a step's bytes go."""

    partial: Path

    def write(self, name: str, offset: int, data: Array) -> None: ...
    def copy(self, name: str, source: Path, at: int) -> None: ...


class Step:
    """One edit while it runs: hashes what it reads and writes, and keeps its targets' ends.

    `device` is where it computes.
    """

    def __init__(
        self, edit: Edit, sink: Sink | None, tile_bytes: int, stop: threading.Event,
        device: Device = HOST,
    ) -> None:  # fmt: skip
        self.tile_bytes, self._sink, self._stop = tile_bytes, sink, stop
        self.device = device
        self._targets = {info.name: info for info in edit.targets}
        self._reached = dict.fromkeys(self._targets, 0)
        self._read: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self.read: dict[str, str] = {}

    @property
    def scratch(self) -> Path | None:
        """Where an edit leaves what the plan's `finish` will need; None in a rehearsal."""
        if self._sink is None:
            return None
        folder = self._sink.partial / SCRATCH
        folder.mkdir(exist_ok=True)
        return folder

    def tiles(
        self, source: Checkpoint, name: str, multiple: int = 1
    ) -> Iterator[tuple[int, Array]]:
        """(first row, rows) over a tensor; a tile's elements are a multiple of `multiple`."""
        info = source.info(name)
        rows = info.shape[0] if info.shape else 1
        step = tile_rows(info, multiple, self.tile_bytes)
        digest = None if name in self.read else blake3.blake3()
        mapped, seen = source.place(name) is not None, 0
        for start in range(0, rows, step):
            if self._stop.is_set():
                raise Stopped
            tile = source.read(name, start, start + step)
            if digest is not None:
                digest.update(as_bytes(tile))
            yield start, tile
            seen += tile.nbytes
            if mapped and seen >= _RELEASE_BYTES:
                source.release(name)
                seen = 0
        source.release(name)
        if digest is not None:
            self.read[name] = f"blake3:{digest.hexdigest()}"

    def whole(self, source: Checkpoint, name: str) -> Array:
        """A small tensor at once."""
        data = source.read(name)
        self.read[name] = f"blake3:{blake3.blake3(as_bytes(data)).hexdigest()}"
        return data

    def append(self, name: str, data: Array) -> None:
        """The next bytes of a target."""
        raw = as_bytes(data)
        reached = self._reached[name]
        if reached + raw.nbytes > self._targets[name].nbytes:
            raise ShapeError(
                f"{self._targets[name]}: {reached + raw.nbytes} bytes are written. This is a bug."
            )
        self._written.setdefault(name, blake3.blake3()).update(raw)
        if self._sink:
            self._sink.write(name, reached, raw)
        self._reached[name] = reached + raw.nbytes

    def copy(self, name: str, source: Checkpoint, old: str | None = None) -> None:
        """A target that is byte for byte a source's tensor."""
        old = old or name
        place = source.place(old)
        if place is None:
            for _, tile in self.tiles(source, old):
                self.append(name, tile)
            return
        if self._sink:
            self._sink.copy(name, *place)
        self._reached[name] = self._targets[name].nbytes

    def finish(self) -> dict[str, str]:
        """Digests of the appended targets, all of which must be full."""
        for name, info in self._targets.items():
            if self._reached[name] != info.nbytes:
                raise ShapeError(f"{info}: {self._reached[name]} bytes are written. This is a bug.")
        return {name: f"blake3:{d.hexdigest()}" for name, d in self._written.items()}


class Stopped(Exception):
    """Another thread failed; this one ends too."""


def tile_rows(info: TensorInfo, multiple: int, tile_bytes: int) -> int:
    """Rows of one tile: about tile_bytes, and elements that divide by `multiple` if rows allow."""
    if not info.shape:
        return 1
    row = max(1, info.numel // max(1, info.shape[0]))
    unit = multiple // gcd(row, multiple)
    row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
    return max(unit, tile_bytes // row_bytes // unit * unit)


def copy_edit(source: Checkpoint, name: str) -> Edit:
    """The edit that changes nothing."""

    def apply(step: Step) -> Metrics:
        step.copy(name, source)
        return {}

    return Edit(name, (source.info(name),), apply)
