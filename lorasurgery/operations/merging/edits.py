"""The edit of a merge into 16 or 32 bits: W' = round(W + B A), tile by tile, with what was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import blake3

from lorasurgery.arrays import NUMPY, Array
from lorasurgery.change import Change, LowRank
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.edit import Edit, Metrics, Step
from lorasurgery.errors import ValueRangeError
from lorasurgery.operations.merging.retained import Sums
from lorasurgery.operations.undoing.undo_record import Keep, Kept, keeping
from lorasurgery.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Source:
    """Where an edit's base weight is read: the base itself, its original, or the adapter's own."""

    checkpoint: Checkpoint
    name: str
    multiple: int = 1  # tiles hold this many elements or a multiple of it

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.info(self.name)


@dataclass(frozen=True, slots=True)
class Rounding:
    """To the nearest, or by chance (which is right on average) with a seed."""

    seed: int | None = None

    def of(self, name: str) -> int | None:
        """Each tensor has chances of its own."""
        if self.seed is None:
            return None
        return int.from_bytes(blake3.blake3(f"{self.seed} {name}".encode()).digest(7), "little")


@dataclass(frozen=True, slots=True)
class Task:
    """One tensor of the output: where it comes from, what is added, and what is kept of the base."""

    out: TensorInfo
    source: Source
    change: Callable[[], Change] | None
    rounding: Rounding
    kept: Kept | None = None
    replaced: bool = False


def merge_edit(task: Task) -> Edit:
    """Read, add, round to out.dtype. Raises ValueRangeError where the result is not finite."""

    def apply(step: Step) -> Metrics:
        change = task.change() if task.change else LowRank.nothing(task.source.info)
        sums = Sums()
        with keeping(step, task.kept) as keep:
            for merged in _merged(step, task, change, sums, keep):
                step.append(task.out.name, merged)
        if not sums.finite:
            raise not_finite(task.source, task.out)
        facts = {"replaced": float(task.out.numel)} if task.replaced else {}
        return {**sums.metrics(), "rank": change.rank, **facts} if task.change else facts

    return Edit(task.out.name, (task.out,), apply)


def whole_edit(source: Source, out: TensorInfo, kept: Kept | None) -> Edit:
    """A tensor of numbers that are no floats (a counter, a mask), taken as it is."""

    def apply(step: Step) -> Metrics:
        with keeping(step, kept):
            step.append(out.name, step.whole(source.checkpoint, source.name))
        return {"replaced": float(out.numel)}

    return Edit(out.name, (out,), apply)


def _merged(step: Step, task: Task, change: Change, sums: Sums, keep: Keep) -> Iterator[Array]:
    source, dtype = task.source, NUMPY[task.out.dtype]
    seed, row = task.rounding.of(task.out.name), source.info.numel // max(1, _rows(source.info))
    for start, tile in step.tiles(source.checkpoint, source.name, source.multiple):
        stop = start + (len(tile) if tile.ndim else 1)
        for part, piece in change.tiles(start, stop):
            first = start + (part.start or 0)
            last = stop if part.stop is None else start + part.stop
            w = tile.reshape(-1)[(first - start) * row : (last - start) * row]
            w = w.reshape(-1, change.columns)
            merged, *numbers = piece.merge(w, dtype, seed, first * row, step.device)
            sums.add(*numbers)
            keep(first, last, merged, piece)
            yield merged


def _rows(info: TensorInfo) -> int:
    return info.shape[0] if info.shape else 1


def not_finite(source: Source, out: TensorInfo) -> ValueRangeError:
    """The error of a merge that overflows, or whose base or adapter holds nan."""
    return ValueRangeError(
        f"{out.name}: nan or inf after the merge of {source.name} ({source.info.dtype}) into "
        f"{out.dtype}. Look for it in the base and the adapter, or choose a wider --dtype."
    )
