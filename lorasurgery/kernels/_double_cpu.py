"""The second level of NF4's scales in numba: their mean as torch sums it, their codes, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.kernels._floats import source
from lorasurgery.kernels._numba import inner, jit

LANES = 8  # of torch's vectors, also on processors with wider ones: its sum has no wider form
GRAIN = 32768  # torch gives no thread fewer elements

f4, f8 = np.float32, np.float64


def mean(x: Array, threads: int) -> np.float32:
    """torch.mean of float32 [n] on so many threads, bit for bit."""
    n = len(x)
    if n < GRAIN or threads == 1:
        return f4(total(x) / f4(n))
    pieces = min(threads, -(-n // GRAIN))
    length = -(-n // pieces)
    parts = np.zeros(threads, f4)
    for i in range(pieces):
        parts[i] = total(x[i * length : (i + 1) * length])
    return f4(total(source(parts)) / f4(n))


@jit
def total(x: Any) -> Any:
    """One thread's sum: 32 running sums, the vector's rest, the scalar rest, then the lanes."""
    n = len(x)
    lanes = LANES if n >= LANES else 1
    found, result = _lanes(x, lanes), f4(0)
    for k in range(n // lanes * lanes, n):
        result += x[k]
    for k in range(lanes):
        result += found[k]
    return result


@jit
def quantize(absmax: Any, offset: Any, block: Any, positions: Any, q: Any, nested: Any) -> Any:
    """Fill q and nested: (absmax - offset) / nested on a grid of 2^16 positions, then its code."""
    n = len(absmax)
    for i in range(len(nested)):
        start, stop = i * block, min(i * block + block, n)
        largest = f4(0)
        for j in range(start, stop):
            largest = max(largest, abs(absmax[j] - offset))
        nested[i] = largest
        if largest == 0:
            for j in range(start, stop):
                q[j] = 0
            continue
        inverse = f4(1) / largest
        for j in range(start, stop):
            x = min(max((absmax[j] - offset) * inverse, f4(-1)), f4(1))
            # one rounding of a product and a sum, as a fused multiply-add does
            at = f4(f8((x + f4(1)) * f4(0.5)) * 65535.0 + 0.5)
            # nan: 0 times the reciprocal of a number too small to have one
            q[j] = positions[int(at)] if at >= 0 else positions[0]


@jit
def dequantize(q: Any, nested: Any, offset: Any, block: Any, table: Any, out: Any) -> Any:
    """out[i] = table[q[i]] · nested[i // block] + offset, product and sum rounded each."""
    n = len(q)
    for i in range(len(nested)):
        scale = nested[i]
        for j in range(i * block, min(i * block + block, n)):
            out[j] = table[q[j]] * scale + offset


@inner
def _lanes(x: Any, lanes: Any) -> Any:
    """Sums of every lanes-th element, four at a time, cascaded over four levels."""
    width, vectors = 4 * lanes, len(x) // lanes
    rows = vectors // 4
    sums = np.zeros((4, width), f4)
    power = max(4, _ceil_log2(rows) // 4)
    step = 1 << power
    i = 0
    while i + step <= rows:
        _add_rows(x[i * width : (i + step) * width], sums[0])
        i += step
        for level in range(1, 4):
            _add_rows(sums[level - 1], sums[level])
            for k in range(width):
                sums[level - 1, k] = f4(0)
            if i & ((step - 1) << (level * power)):
                break
    _add_rows(x[i * width : rows * width], sums[0])
    for level in range(1, 4):
        _add_rows(sums[level], sums[0])
    found = sums[0, :lanes]
    _add_rows(x[4 * rows * lanes : vectors * lanes], found)
    for k in range(1, 4):
        _add_rows(sums[0, k * lanes : (k + 1) * lanes], found)
    return found


@inner
def _add_rows(x: Any, sums: Any) -> Any:
    """One row of x after another, each as long as `sums`."""
    width = len(sums)
    for start in range(0, len(x), width):
        row = x[start : start + width]
        for k in range(width):
            sums[k] += row[k]


@inner
def _ceil_log2(n: Any) -> Any:
    power = 1
    while (1 << power) < n:
        power += 1
    return power
