"""The edits of a merge into a quantized base: encode(W + B A) under a policy, and what it kept.

A change smaller than half a code's cell is lost when rounded to the nearest code: policies differ in
how they avoid that. The scales are quantized too, so what was kept is measured in a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.arrays import NUMPY, Array
from lorasurgery.change import Change, LowRank
from lorasurgery.codec import Codec, CodecOptions, Packed, Rule
from lorasurgery.edit import Edit, Metrics, Step
from lorasurgery.model import Model
from lorasurgery.operations.merging.edits import Rounding, Source, not_finite
from lorasurgery.operations.merging.residual import save_residual
from lorasurgery.operations.merging.retained import Sums
from lorasurgery.operations.undoing.undo_record import Keep, Kept, keeping
from lorasurgery.weights import codec_of

POLICIES = ("rtn", "keep-absmax", "stochastic", "from-original", "residual")


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
    def target(self) -> Packed:
        """How the merged weight is stored: as the base was; its own scales where they are kept."""
        if self.policy == "keep-absmax":
            return self.packed
        state = self.packed.state
        options = CodecOptions(int(state["blocksize"]), "nested_blocksize" in state)
        return replace(self.codec.parts(self.packed.info, options), device=self.packed.device)


@dataclass(frozen=True, slots=True)
class _Encoded:
    codes: Array
    absmax: Array  # as it will be decoded
    packed: Packed
    table: Array


def requantize_edit(task: Task) -> Edit:
    """Encode by tiles, seal the scales, then measure what the codes hold of the change."""
    target = task.target

    def apply(step: Step) -> Metrics:
        change = task.change()
        encoded = _encode(step, task, target, change)
        sums, residual = Sums(), None
        if task.policy == "residual":
            residual = save_residual(step, task.name, _lost(step, task, encoded, change), task.rank)
        with keeping(step, task.kept) as keep:
            for signal, power, noise2 in _measure(step, task, encoded, (change, residual), keep):
                sums.add(signal, power, noise2)
        if not sums.finite:
            raise not_finite(task.values, task.packed.info)
        return {**sums.metrics(), "rank": change.rank}

    return Edit(task.name, tuple(target.parts.values()), apply)


def _encode(step: Step, task: Task, target: Packed, change: Change) -> _Encoded:
    codes, absmax = [], []
    scales = task.model.weights.scales(task.name) if task.policy == "keep-absmax" else None
    seed = task.rounding.of(task.name) if task.policy == "stochastic" else None
    for start, tile in step.tiles(task.values.checkpoint, task.values.name, _multiple(task)):
        [(_, piece)] = change.tiles(start, start + len(tile))
        wanted, *_ = piece.merge(tile, NUMPY["F32"], device=step.device)
        begin, end = start * tile.shape[1], (start + len(tile)) * tile.shape[1]
        kept = None if scales is None else _blocks(scales, begin, end, task.codec, target)
        rule = Rule(absmax=kept, seed=seed, offset=begin)
        tile_codes, tile_absmax = task.codec.encode(wanted.reshape(-1), target, rule)
        step.append(target.codes, tile_codes)
        codes.append(tile_codes)
        absmax.append(tile_absmax)
    decoded, table = _seal(step, task, target, np.concatenate(absmax))
    return _Encoded(np.concatenate(codes), decoded, target, table)


def _seal(step: Step, task: Task, target: Packed, absmax: Array) -> tuple[Array, Array]:
    """Write the parts beside the codes; the scales as they decode, and the table."""
    stored = task.model.stored
    if task.policy == "keep-absmax":
        for part, info in target.parts.items():
            if part:
                step.copy(info.name, stored)
        return task.model.weights.scales(task.name), task.codec.table(target, stored.read)
    sealed, decoded = task.codec.seal(absmax, target)
    for part, data in sealed.items():
        step.append(target.info.name + part, data)
    return decoded, task.codec.table(target, lambda name: sealed[name[len(target.info.name) :]])


def _decoded(step: Step, task: Task, encoded: _Encoded) -> Iterator[tuple[int, Array, Array]]:
    """(first row, base view, what the new codes stand for) by tiles, float32."""
    packed = replace(encoded.packed, info=replace(encoded.packed.info, dtype="F32"))
    for start, tile in step.tiles(task.model.weights, task.name, _multiple(task)):
        begin, end = start * tile.shape[1], (start + len(tile)) * tile.shape[1]
        flat = task.codec.decode(
            encoded.codes[begin // 2 : -(-end // 2)],
            _blocks(encoded.absmax, begin, end, task.codec, packed),
            encoded.table, end - begin, packed,
        )  # fmt: skip
        yield start, tile.astype(np.float32), flat.reshape(tile.shape)


def _lost(step: Step, task: Task, encoded: _Encoded, change: Change) -> Array:
    """W + B A less what the codes stand for, the whole weight in float32."""
    parts = []
    for start, base, got in _decoded(step, task, encoded):
        [(_, piece)] = change.tiles(start, start + len(base))
        wanted, *_ = piece.merge(base, NUMPY["F32"], device=step.device)
        parts.append(wanted - got)
    return np.concatenate(parts)


def _measure(
    step: Step, task: Task, encoded: _Encoded, changes: tuple[Change, LowRank | None], keep: Keep
) -> Iterator[tuple[float, float, float]]:
    change, residual = changes
    dtype = np.dtype(task.model.weights.read(task.name, 0, 1).dtype)
    for start, base, got in _decoded(step, task, encoded):
        [(_, piece)] = change.tiles(start, start + len(base))
        keep(start, start + len(base), got.astype(dtype), piece)
        if residual:
            [(_, beside)] = residual.tiles(start, start + len(base))
            base = base - beside.rows()  # noqa: PLW2901 - the residual counts as made
        delta = piece.rows().reshape(-1)
        made = (got - base).reshape(-1)
        noise = made - delta
        yield float(np.dot(made, delta)), float(np.dot(delta, delta)), float(np.dot(noise, noise))


def copy_packed(model: Model, name: str) -> Edit:
    """A packed weight that stays as it is, in all its parts."""
    parts = tuple(model.weights.packed[name].parts.values())

    def apply(step: Step) -> Metrics:
        for info in parts:
            step.copy(info.name, model.stored)
        return {}

    return Edit(name, parts, apply)


def _multiple(task: Task) -> int:
    return task.codec.multiple(task.packed)


def _blocks(absmax: Array, begin: int, end: int, codec: Codec, packed: Packed) -> Array:
    block = codec.multiple(packed)
    return absmax[begin // block : -(-end // block)]
