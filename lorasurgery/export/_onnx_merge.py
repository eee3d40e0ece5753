"""An initializer with a change added, or replaced as a whole, computed when the model is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import blake3
import numpy as np

from lorasurgery.arrays import NUMPY, as_bytes
from lorasurgery.change import LowRank
from lorasurgery.errors import ValueRangeError
from lorasurgery.export._onnx_edit import Edited
from lorasurgery.export._onnx_modules import Modules, Place
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.change import Change, Piece, Rows

_TILE = 1 << 18  # weights

# takes the base's rows, and what will be predicted for them
Record: TypeAlias = Callable[["Array", "Array"], None]


@dataclass(slots=True)
class Merging:
    """One tensor on its way; signal, power and noise2 of `sums`, and digests, are known once it was computed."""

    view: Modules
    name: str
    change: Callable[[Rows], Change] | None  # of the tensor as it is seen; None: nothing is added
    whole: Callable[[], Array] | None  # what it is replaced by
    seed: int | None
    recording: Callable[[], AbstractContextManager[Record]] | None = None  # for the way back
    sums: list[tuple[float, float, float]] = field(default_factory=list)  # of each tile
    rank: int = 0
    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        return self.view.places[self.name]

    def compute(self, *, turned: bool) -> Array:
        """The new tensor in the initializer's dtype, transposed if turned. Raises ValueRangeError if it overflows."""
        name, file = self.place.initializer, self.view.file
        stored, shape = file.read(name), self.place.shape
        w = stored.T if self.place.turned else stored
        merged = np.empty(shape[::-1] if turned else shape, w.dtype)
        # a second computation, of the other orientation, counts nothing twice
        if self.read:
            self._fill(merged.T if turned else merged, w, None, [])
        else:
            with self.recording() if self.recording else nullcontext() as record:
                self._fill(merged.T if turned else merged, w, record, self.sums)
        if not math.isfinite(sum(map(sum, self.sums))):
            raise ValueRangeError(
                f"{file.path}: {name} with the change does not fit in its type, or holds values "
                "that are not finite. Export it as float32."
            )
        self.read[name] = f"blake3:{blake3.blake3(as_bytes(stored)).hexdigest()}"
        self.written[name] = f"blake3:{blake3.blake3(as_bytes(merged)).hexdigest()}"
        file.release(name)
        return merged

    def _fill(
        self, seen: Array, w: Array, record: Record | None, sums: list[tuple[float, float, float]]
    ) -> None:
        if self.whole:
            w = self.whole()
            if w.dtype.kind not in "fV":
                seen[...] = w
                return
        info = TensorInfo(self.name, self.view.info(self.name).dtype, self.place.shape)
        change = (
            self.change(lambda a, b: contiguous(w[a:b])) if self.change else LowRank.nothing(info)
        )
        self.rank = change.rank
        for at, rows, piece, offset in walk(w, change):
            tile, *numbers = piece.merge(rows, NUMPY[info.dtype], self.seed, offset)
            seen[at] = tile.reshape(seen[at].shape)
            sums.append((numbers[0], numbers[1], numbers[2]))
            if record:
                record(rows, piece.before(tile, rows.dtype))

    def finish(self) -> list[tuple[float, float, float]]:
        """The sums, of a weight that was computed or is now, for nothing."""
        if not self.read:
            self.compute(turned=self.place.turned)
        return self.sums


def walk(w: Array, change: Change) -> Iterator[tuple[slice, Array, Piece, int]]:
    """(which of the first dimension, W [rows, columns] there, what is added, the number of its first weight)."""
    row = w.size // max(1, len(w))
    step = max(1, _TILE // max(1, row))
    for start in range(0, len(w), step):
        stop = min(start + step, len(w))
        for part, piece in change.tiles(start, stop):
            first = start + (part.start or 0)
            at = slice(first, stop if part.stop is None else start + part.stop)
            yield at, contiguous(w[at]).reshape(-1, change.columns), piece, first * row


def contiguous(w: Array) -> Array:
    return np.ascontiguousarray(w)


def put(edited: Edited, one: Merging) -> None:
    """Into the initializer, if it is this module's alone; else into a new one for its nodes."""
    place = one.place
    if place.alone:
        edited.made[place.initializer] = lambda: one.compute(turned=place.turned)
        return
    own: dict[bool, Any] = {}
    for index, at in place.inputs:
        node = edited.nodes[index]
        product = len(place.shape) == 2
        turned = product and (node.op_type == "MatMul" or not node.attributes.get_int("transB", 0))
        old = node.inputs[at]
        if turned not in own:
            own[turned] = _own(edited, one, turned=turned)
        node.replace_input_with(at, own[turned])
        edited.drop_unused(old)


def _own(edited: Edited, one: Merging, *, turned: bool) -> Any:
    import onnx_ir as ir

    dtype = NUMPY[edited.file.info(one.place.initializer).dtype]
    shape = one.place.shape[::-1] if turned else one.place.shape
    return edited.add(
        one.name, ir.DataType.from_numpy(dtype), shape, lambda: one.compute(turned=turned)
    )
