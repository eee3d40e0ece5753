"""B A, and W + B A with what rounding made of it, in numba.

A chunk of columns is held in the first-level cache while the rows pass by. The sum over the rank is
unrolled by hand and never reassociated or fused, so its bits are the same on every processor.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._chance_cpu import uniform
from lorasurgery.kernels._floats import by_chance, load, nearest
from lorasurgery.kernels._numba import inner, jit

CHUNK = 256  # columns
FLUSH = 32  # rows that are summed in float32 before float64 takes over

f4, u8 = np.float32, np.uint64


@jit
def delta(a: Any, b: Any, out: Any) -> Any:
    """d[i, j] = sum over k = 0, 1, ... of b[i, k] a[k, j], each product and each sum rounded."""
    columns = a.shape[1]
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty(CHUNK, f4)
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        chunk[:, :n] = a[:, start : start + n]
        for i in range(out.shape[0]):
            _row(b[i], chunk, d)
            out[i, start : start + n] = d[:n]


@jit
def merge(w: Any, a: Any, b: Any, out: Any, chance: Any) -> Any:
    """out = round(w + d); returns sums over out - w = c: of c·d, d² and (c - d)².

    `chance` is None, or a tuple: the two keys of a seed, and the index of w's first element.
    """
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty(CHUNK, f4)
    sums = np.zeros((3, CHUNK), f4)
    signal = power = noise2 = 0.0
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        chunk[:, :n] = a[:, start : start + n]
        for i in range(rows):
            _row(b[i], chunk, d)
            source, target = w[i, start : start + n], out[i, start : start + n]
            if chance is None:
                for j in range(n):
                    target[j] = nearest(target[j], load(source[j]) + d[j])
            else:
                first = chance[2] + u8(i) * u8(columns) + u8(start)
                for j in range(n):
                    h = uniform(chance, first + u8(j))
                    target[j] = by_chance(target[j], load(source[j]) + d[j], h)
            _measure(source, target, d, sums)
            if i % FLUSH == FLUSH - 1 or i == rows - 1:
                for j in range(n):
                    signal += sums[0, j]
                    power += sums[1, j]
                    noise2 += sums[2, j]
                sums[:] = 0
    return signal, power, noise2


@inner
def _row(b: Any, a: Any, d: Any) -> Any:
    """One row of a chunk; -0 is what a sum may begin with and leave no trace."""
    rank, k = a.shape[0], 0
    for j in range(CHUNK):
        d[j] = f4(-0.0)
    while k + 8 <= rank:
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        b4, b5, b6, b7 = b[k + 4], b[k + 5], b[k + 6], b[k + 7]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        a4, a5, a6, a7 = a[k + 4], a[k + 5], a[k + 6], a[k + 7]
        for j in range(CHUNK):
            x = d[j] + b0 * a0[j] + b1 * a1[j] + b2 * a2[j] + b3 * a3[j]
            d[j] = x + b4 * a4[j] + b5 * a5[j] + b6 * a6[j] + b7 * a7[j]
        k += 8
    while k < rank:
        b0, a0 = b[k], a[k]
        for j in range(CHUNK):
            d[j] = d[j] + b0 * a0[j]
        k += 1


@inner
def _measure(source: Any, target: Any, d: Any, sums: Any) -> Any:
    """Column by column, so that the order of each sum is fixed and vectors still serve."""
    signal, power, noise2 = sums[0], sums[1], sums[2]
    for j in range(len(source)):
        change = load(target[j]) - load(source[j])
        signal[j] += change * d[j]
        power[j] += d[j] * d[j]
        noise2[j] += (change - d[j]) * (change - d[j])
