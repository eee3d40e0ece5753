"""Tensors that no adapter's factors touch: the same bytes, or the adapter's own tensor in their place."""

from __future__ import annotations

import numpy as np

from lorasurgery.arrays import NUMPY, Array, as_bytes
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.edit import tile_rows
from lorasurgery.targets import Whole
from lorasurgery.weights import Weights

# from 128 KiB on, malloc would map and unmap the result of each comparison
_TILE = 64 << 10
# after so many tiles the pages that were read may go
_RELEASE = 512


def differing(one: Checkpoint, old: str, two: Checkpoint, new: str) -> int:
    """In how many elements two tensors of one shape differ, bit by bit.

    Where the dtypes differ, `one` is rounded to that of `two` first.
    """
    info, count = two.info(new), 0
    rows = info.shape[0] if info.shape else 1
    # what has no numpy form is read whole, as bytes
    step = tile_rows(info, 1, _TILE) if info.dtype in NUMPY else max(1, rows)
    for start in range(0, rows, step):
        if start // step % _RELEASE == _RELEASE - 1:
            one.release(old)
            two.release(new)
        before, after = one.read(old, start, start + step), two.read(new, start, start + step)
        if before.dtype != after.dtype:
            before = before.astype(after.dtype)
        count += _unequal(before, after)
    one.release(old)
    two.release(new)
    return count


def differing_parts(one: Weights, two: Weights, name: str) -> int | None:
    """The same for a quantized weight, over all it is stored in; None if it is stored otherwise."""
    before = {part: one.stored.info(i.name) for part, i in one.packed[name].parts.items()}
    after = {part: two.stored.info(i.name) for part, i in two.packed[name].parts.items()}
    if before != after:
        return None
    return sum(differing(one.stored, i.name, two.stored, i.name) for i in before.values())


def differing_whole(whole: Whole, merged: Checkpoint, name: str) -> int:
    """How many elements of a replaced tensor are not the adapter's, rounded to the file's dtype."""
    wanted = whole.load().astype(NUMPY[merged.info(name).dtype])
    return _unequal(wanted, merged.read(name))


def _unequal(one: Array, two: Array) -> int:
    """How many elements of two arrays of one dtype differ in a bit; nan equals itself."""
    left, right = as_bytes(one), as_bytes(two)
    if np.array_equal(left, right):
        return 0
    width = max(1, two.itemsize)
    return int((left != right).reshape(-1, width).any(axis=1).sum())
