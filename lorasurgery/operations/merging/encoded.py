"""A packed weight encoded anew in one pass, rows at a time: codes straight from the base's, or from values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import Change, Factors, LowRank
from lorasurgery.codec import Codec, CodecOptions, Coded, Packed, Rule, Stored
from lorasurgery.edit import Step
from lorasurgery.model import Model
from lorasurgery.operations.merging.edits import Rounding, Source
from lorasurgery.operations.undoing.undo_record import Kept
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import codec_of


@dataclass(frozen=True, slots=True)
class Task:
    """One packed weight: `values` is where W is read, the base's own view or its original."""

    model: Model
    name: str
    values: Source
    change: Callable[[], Change]
    policy: str
    rounding: Rounding
    rank: int  # of the residual
    kept: Kept | None = None

    @property
    def packed(self) -> Packed:
        return self.model.weights.packed[self.name]

    @property
    def codec(self) -> Codec:
        return codec_of(self.packed.codec)

    @property
    def block(self) -> int:
        """Weights that a tile holds, or a multiple of it."""
        return self.codec.multiple(self.packed)

    @property
    def target(self) -> Packed:
        """How the merged weight is stored: as the base was; its own scales where they are kept."""
        if self.policy == "keep-absmax":
            return self.packed
        state = self.packed.state
        options = CodecOptions(int(state["blocksize"]), "nested_blocksize" in state)
        return replace(self.codec.parts(self.packed.info, options), device=self.packed.device)

    @property
    def of_itself(self) -> bool:
        """Whether W is what the base's codes stand for."""
        return self.values.checkpoint is self.model.weights and self.values.name == self.name

    @property
    def table(self) -> Array:
        """What the base's codes stand for."""
        return self.codec.table(self.packed, self.model.stored.read)

    def rule(self, begin: int, end: int) -> Rule:
        """How elements begin:end, which are whole blocks, become codes."""
        if self.policy == "keep-absmax":
            scales = self.model.weights.scales(self.name)
            return Rule(absmax=blocks(scales, begin, end, self.block), table=self.table)
        seed = self.rounding.of(self.name) if self.policy == "stochastic" else None
        return Rule(seed=seed, offset=begin)


def encoded(step: Step, task: Task, change: Change) -> Iterator[Coded]:
    """The weight in its new codes, tile by tile."""
    if task.of_itself and isinstance(change, LowRank):
        return _recoded(step, task, change)
    return _summed(step, task, change)


def _recoded(step: Step, task: Task, change: LowRank) -> Iterator[Coded]:
    """The base's codes pass by, and are never decoded into memory."""
    stored, packed, target = task.model.stored, task.packed, task.target
    columns, scales, table = change.columns, task.model.weights.scales(task.name), task.table
    for info in packed.parts.values():
        if info.name != packed.codes:
            step.whole(stored, info.name)
    (a,), (b,), held = change.a, change.b, stored.info(packed.codes)
    for start, tile in step.tiles(stored, packed.codes, _words(held, columns, task.block)):
        codes = tile.reshape(-1).view(np.uint8)
        begin = 2 * start * (held.nbytes // held.shape[0])
        end = min(begin + 2 * len(codes), packed.info.numel)
        factors = a, b[begin // columns : end // columns]
        here = Stored(codes, blocks(scales, begin, end, task.block), table)
        yield task.codec.recode(here, factors, target, task.rule(begin, end))


def _words(info: TensorInfo, columns: int, block: int) -> int:
    """Elements of the stored codes that are whole rows and whole blocks; bytes may lie in wider ones."""
    size = info.nbytes // max(1, info.numel)
    return lcm(lcm(max(1, columns), 2 * block) // 2, size) // size


def _summed(step: Step, task: Task, change: Change) -> Iterator[Coded]:
    """W + D in float32; what it holds of D is measured from what the base decodes to."""
    values, target = task.values, task.target
    for start, tile in step.tiles(values.checkpoint, values.name, task.block):
        stop = start + len(tile)
        [(_, piece)] = change.tiles(start, stop)
        w = base = tile.reshape(len(tile), -1)
        if not task.of_itself:
            base = task.model.weights.read(task.name, start, stop).reshape(w.shape)
        added = (piece.a, piece.b) if isinstance(piece, Factors) else piece.rows()
        begin, end = start * w.shape[1], stop * w.shape[1]
        yield task.codec.encode_sum(w, base, added, target, task.rule(begin, end))


def blocks(absmax: Array, begin: int, end: int, block: int) -> Array:
    """The scales of elements begin:end."""
    return absmax[begin // block : -(-end // block)]
