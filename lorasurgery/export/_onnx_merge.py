"""An initializer with a change added, computed when the model is written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import blake3
import numpy as np

from lorasurgery.arrays import NUMPY, as_bytes
from lorasurgery.errors import ValueRangeError
from lorasurgery.export._onnx_edit import Edited
from lorasurgery.export._onnx_linear import Linear

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.formats.onnx import File
    from lorasurgery.target import Target

_TILE = 1 << 18  # weights


@dataclass(slots=True)
class Merging:
    """One weight on its way; signal, power and noise2 of `sums`, and digests, are known once it was computed."""

    file: File
    linear: Linear
    target: Target
    seed: int | None
    sums: list[tuple[float, float, float]] = field(default_factory=list)  # of each tile
    rank: int = 0
    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def compute(self, *, turned: bool) -> Array:
        """W' in the initializer's dtype, [in, out] if turned. Raises ValueRangeError if it overflows."""
        name, (out, in_) = self.linear.initializer, self.linear.shape
        stored = self.file.read(name)
        w = stored.T if self.linear.turned else stored
        merged = np.empty((in_, out) if turned else (out, in_), w.dtype)
        seen = merged.T if turned else merged
        change = self.target.change(lambda start, stop: np.ascontiguousarray(w[start:stop]))
        step = max(1, _TILE // max(1, in_))
        # a second computation, of the other orientation, counts nothing twice
        first = not self.read
        for start in range(0, out, step):
            rows = np.ascontiguousarray(w[start : start + step])
            for _, piece in change.tiles(start, min(start + step, out)):
                tile, *sums = piece.merge(
                    rows, NUMPY[self.file.info(name).dtype], self.seed, start * in_
                )
                seen[start : start + step] = tile
                if first:
                    self.sums.append((sums[0], sums[1], sums[2]))
        if not math.isfinite(sum(map(sum, self.sums))):
            raise ValueRangeError(
                f"{self.file.path}: {name} with the change does not fit in its type, or holds values "
                "that are not finite. Export it as float32."
            )
        self.rank = change.rank
        self.read[name] = f"blake3:{blake3.blake3(as_bytes(stored)).hexdigest()}"
        self.written[name] = f"blake3:{blake3.blake3(as_bytes(merged)).hexdigest()}"
        self.file.release(name)
        return merged

    def finish(self) -> list[tuple[float, float, float]]:
        """The sums, of a weight that was computed or is now, for nothing."""
        if not self.read:
            self.compute(turned=self.linear.turned)
        return self.sums


def put(edited: Edited, one: Merging) -> None:
    """Into the initializer, if it is this module's alone; else into a new one for its nodes."""
    linear = one.linear
    if linear.alone:
        edited.made[linear.initializer] = lambda: one.compute(turned=linear.turned)
        return
    own: dict[bool, Any] = {}
    for index in linear.nodes:
        node = edited.nodes[index]
        turned = node.op_type == "MatMul" or not node.attributes.get_int("transB", 0)
        old = node.inputs[1]
        if turned not in own:
            own[turned] = _own(edited, one, turned=turned)
        node.replace_input_with(1, own[turned])
        edited.drop_unused(old)


def _own(edited: Edited, one: Merging, *, turned: bool) -> Any:
    import onnx_ir as ir

    dtype = NUMPY[edited.file.info(one.linear.initializer).dtype]
    shape = one.linear.shape[::-1] if turned else one.linear.shape
    name = f"{one.linear.module}.weight"
    return edited.add(
        name, ir.DataType.from_numpy(dtype), shape, lambda: one.compute(turned=turned)
    )
