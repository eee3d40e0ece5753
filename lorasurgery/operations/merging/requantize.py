"""The edits of a merge into a quantized base: encode(W + B A) under a policy, and what it kept.

A change smaller than half a code's cell is lost when rounded to the nearest code: policies differ in
how they avoid that. The scales are quantized too, once all are known: until then what the codes hold
of the change is kept by block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import Change
from lorasurgery.codec import Packed
from lorasurgery.edit import Edit, Metrics, Step, tile_rows
from lorasurgery.kernels import nf4_moments
from lorasurgery.model import Model
from lorasurgery.operations.merging.edits import not_finite
from lorasurgery.operations.merging.encoded import Task, blocks, encoded
from lorasurgery.operations.merging.residual import save_residual, with_residual
from lorasurgery.operations.merging.retained import Sums
from lorasurgery.operations.undoing.undo_record import keeping

POLICIES = ("rtn", "keep-absmax", "stochastic", "from-original", "residual")


_NONE = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class _Sealed:
    codes: Array  # none, if nothing will decode them
    absmax: Array  # as it will be decoded
    table: Array
    packed: Packed


def requantize_edit(task: Task) -> Edit:
    """Encode by tiles, seal the scales, and from these tell what the codes hold of the change."""
    target = task.target

    def apply(step: Step) -> Metrics:
        change = task.change()
        sealed, sums = _sealed(step, task, target, change)
        if not sums.finite:
            raise not_finite(task.values, task.packed.info)
        if task.policy == "residual":
            lost = _lost(step, task, sealed, change)
            residual = save_residual(step, task.name, lost, task.rank)
            sums = with_residual(sums, residual, lost, change)
        _keep(step, task, sealed, change)
        task.model.weights.release(task.name)
        return {**sums.metrics(), "rank": change.rank}

    return Edit(task.name, tuple(target.parts.values()), apply)


def _sealed(step: Step, task: Task, target: Packed, change: Change) -> tuple[_Sealed, Sums]:
    """Write all parts, the codes as they come; what they hold of the change, by their final scales."""
    decoding = task.policy == "residual" or _undoing(step, task)
    codes: list[Array] = []
    kept: list[tuple[Array, Array]] = []
    for coded in encoded(step, task, change):
        step.append(target.codes, coded.codes)
        codes += [coded.codes] if decoding else []
        kept.append((coded.absmax, coded.moments))
    decoded, table = _seal(step, task, target, np.concatenate([absmax for absmax, _ in kept]))
    sums, at = Sums(), 0
    for absmax, moments in kept:
        end = at + len(absmax)
        sums.add(*nf4_moments.finish(moments, absmax, decoded[at:end]))
        at = end
    return _Sealed(np.concatenate([*codes, _NONE]), decoded, table, target), sums


def _seal(step: Step, task: Task, target: Packed, absmax: Array) -> tuple[Array, Array]:
    """Write the parts beside the codes; the scales as they decode, and the table."""
    stored = task.model.stored
    if task.policy == "keep-absmax":
        for part, info in target.parts.items():
            if part:
                step.copy(info.name, stored)
        return task.model.weights.scales(task.name), task.table
    sealed, decoded = task.codec.seal(absmax, target)
    for part, data in sealed.items():
        step.append(target.info.name + part, data)
    return decoded, task.codec.table(target, lambda name: sealed[name[len(target.info.name) :]])


def _lost(step: Step, task: Task, sealed: _Sealed, change: Change) -> Array:
    """W + B A less what the codes stand for, the whole weight in float32, rounded once."""
    parts = []
    # with scales of 1, what is decoded is the levels themselves
    levels = replace(sealed, absmax=np.ones_like(sealed.absmax))
    wide = task.codec.as_dtype(sealed.packed, "F32")
    for start, tile in step.tiles(task.values.checkpoint, task.values.name, task.block):
        [(_, piece)] = change.tiles(start, start + len(tile))
        lost = piece.rows() + tile.astype(np.float64).reshape(len(tile), -1)
        begin, end = start * lost.shape[1], start * lost.shape[1] + lost.size
        scales = blocks(sealed.absmax, begin, end, task.block).astype(np.float64)
        level = _decoded(task, levels, wide, (start, start + len(tile), lost.shape[1]))
        lost -= level * scales.repeat(task.block)[: lost.size].reshape(lost.shape)
        parts.append(lost.astype(np.float32))
    return np.concatenate(parts)


def _undoing(step: Step, task: Task) -> bool:
    """Whether an undo file will hold how the base's codes differ from what the new ones predict."""
    return bool(step.scratch and task.kept and task.kept.differences)


def _keep(step: Step, task: Task, sealed: _Sealed, change: Change) -> None:
    """What the undo file needs; it reads weights as they will be read."""
    info = task.model.weights.info(task.name)
    rows, columns = info.shape[0], info.numel // info.shape[0]
    at_once = tile_rows(info, task.block, step.tile_bytes)
    with keeping(step, task.kept) as keep:
        for start in range(0, rows if _undoing(step, task) else 0, at_once):
            stop = min(start + at_once, rows)
            [(_, piece)] = change.tiles(start, stop)
            got = _decoded(task, sealed, sealed.packed, (start, stop, columns))
            keep(start, stop, got, piece)


def _decoded(task: Task, sealed: _Sealed, packed: Packed, where: tuple[int, int, int]) -> Array:
    """What the new codes of rows start:stop stand for."""
    start, stop, columns = where
    begin, end = start * columns, stop * columns
    codes, absmax = (
        sealed.codes[begin // 2 : -(-end // 2)],
        blocks(sealed.absmax, begin, end, task.block),
    )
    flat = task.codec.decode(codes, absmax, sealed.table, end - begin, packed)
    return flat.reshape(stop - start, columns)


def copy_packed(model: Model, name: str) -> Edit:
    """A packed weight that stays as it is, in all its parts."""
    parts = tuple(model.weights.packed[name].parts.values())

    def apply(step: Step) -> Metrics:
        for info in parts:
            step.copy(info.name, model.stored)
        return {}

    return Edit(name, parts, apply)
