"""B A, and W + B A with what rounding made of it, in numba.

A chunk of columns is held in the first-level cache while the rows pass by in pairs. The sum over the rank
is unrolled by hand and never reassociated or fused, so its bits are the same on every processor.
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
    rows, columns = out.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((2, CHUNK), f4)
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 2 == 0:
                _two_rows(b[i], b[min(i + 1, rows - 1)], chunk, d[0], d[1])
            source, target = d[i % 2], out[i, start : start + n]
            for j in range(n):
                target[j] = source[j]


@jit
def merge(w: Any, a: Any, b: Any, out: Any, chance: Any) -> Any:
    """out = round(w + d); returns sums over out - w = c: of c·d, d² and (c - d)².

    `chance` is None, or a tuple: the two keys of a seed, and the index of w's first element.
    """
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((2, CHUNK), f4)
    sums = np.zeros((3, CHUNK), f4)
    signal = power = noise2 = 0.0
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 2 == 0:
                _two_rows(b[i], b[min(i + 1, rows - 1)], chunk, d[0], d[1])
            source, target = w[i, start : start + n], out[i, start : start + n]
            _add(source, d[i % 2], target, chance, u8(i) * u8(columns) + u8(start))
            _measure(source, target, d[i % 2], sums)
            if i % FLUSH == FLUSH - 1 or i == rows - 1:
                for j in range(n):
                    signal += sums[0, j]
                    power += sums[1, j]
                    noise2 += sums[2, j]
                    sums[0, j] = sums[1, j] = sums[2, j] = f4(0)
    return signal, power, noise2


@inner
def _take(a: Any, start: Any, chunk: Any) -> Any:
    """The columns from `start` on; what lies beyond the last is computed with, and not used."""
    for k in range(a.shape[0]):
        source, target = a[k, start : start + CHUNK], chunk[k]
        for j in range(len(source)):
            target[j] = source[j]


@inner
def _two_rows(b: Any, c: Any, a: Any, d: Any, e: Any) -> Any:
    """Two rows share each load of a; -0 is what a sum may begin with and leave no trace."""
    rank, k = a.shape[0], 0
    for j in range(CHUNK):
        d[j], e[j] = f4(-0.0), f4(-0.0)
    while k + 4 <= rank:
        b0, b1, b2, b3 = b[k], b[k + 1], b[k + 2], b[k + 3]
        c0, c1, c2, c3 = c[k], c[k + 1], c[k + 2], c[k + 3]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        for j in range(CHUNK):
            x0, x1, x2, x3 = a0[j], a1[j], a2[j], a3[j]
            d[j] = d[j] + b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3
            e[j] = e[j] + c0 * x0 + c1 * x1 + c2 * x2 + c3 * x3
        k += 4
    while k < rank:
        b0, c0, a0 = b[k], c[k], a[k]
        for j in range(CHUNK):
            d[j] = d[j] + b0 * a0[j]
            e[j] = e[j] + c0 * a0[j]
        k += 1


@inner
def _add(source: Any, d: Any, target: Any, chance: Any, first: Any) -> Any:
    if chance is None:
        for j in range(len(source)):
            target[j] = nearest(target[j], load(source[j]) + d[j])
    else:
        first = first + chance[2]
        for j in range(len(source)):
            h = uniform(chance, first + u8(j))
            target[j] = by_chance(target[j], load(source[j]) + d[j], h)


@inner
def _measure(source: Any, target: Any, d: Any, sums: Any) -> Any:
    """Column by column, so that the order of each sum is fixed and vectors still serve."""
    signal, power, noise2 = sums[0], sums[1], sums[2]
    for j in range(len(source)):
        change = load(target[j]) - load(source[j])
        signal[j] += change * d[j]
        power[j] += d[j] * d[j]
        noise2[j] += (change - d[j]) * (change - d[j])
