"""B A, and W + B A with what rounding made of it, in numba.

A chunk of columns is held in the first-level cache while the rows pass by, four at a time. The sum over the rank
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
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 4 == 0:
                _four_rows(b, i, chunk, d)
            source, target = d[i % 4], out[i, start : start + n]
            for j in range(n):
                target[j] = source[j]


@jit
def merge(w: Any, a: Any, b: Any, out: Any, chance: Any) -> Any:
    """out = round(w + d); returns sums over out - w = c: of c·d, d² and (c - d)².

    `chance` is None, or a tuple: the two keys of a seed, and the index of w's first element.
    """
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    sums = np.zeros((3, CHUNK), f4)
    signal = power = noise2 = 0.0
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 4 == 0:
                _four_rows(b, i, chunk, d)
            source, target = w[i, start : start + n], out[i, start : start + n]
            _add(source, d[i % 4], target, chance, u8(i) * u8(columns) + u8(start))
            _measure(source, target, d[i % 4], sums)
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
def _four_rows(b: Any, i: Any, a: Any, d: Any) -> Any:
    """Rows i to i + 3 of B A, or the last ones again; they share each load of a.

    -0 is what a sum may begin with and leave no trace.
    """
    rank, k, last = a.shape[0], 0, b.shape[0] - 1
    e, f, g, h = b[i], b[min(i + 1, last)], b[min(i + 2, last)], b[min(i + 3, last)]
    p, q, r, s = d[0], d[1], d[2], d[3]
    for j in range(CHUNK):
        p[j] = q[j] = r[j] = s[j] = f4(-0.0)
    while k + 4 <= rank:
        e0, e1, e2, e3 = e[k], e[k + 1], e[k + 2], e[k + 3]
        f0, f1, f2, f3 = f[k], f[k + 1], f[k + 2], f[k + 3]
        g0, g1, g2, g3 = g[k], g[k + 1], g[k + 2], g[k + 3]
        h0, h1, h2, h3 = h[k], h[k + 1], h[k + 2], h[k + 3]
        a0, a1, a2, a3 = a[k], a[k + 1], a[k + 2], a[k + 3]
        for j in range(CHUNK):
            x0, x1, x2, x3 = a0[j], a1[j], a2[j], a3[j]
            p[j] = p[j] + e0 * x0 + e1 * x1 + e2 * x2 + e3 * x3
            q[j] = q[j] + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3
            r[j] = r[j] + g0 * x0 + g1 * x1 + g2 * x2 + g3 * x3
            s[j] = s[j] + h0 * x0 + h1 * x1 + h2 * x2 + h3 * x3
        k += 4
    while k < rank:
        e0, f0, g0, h0, a0 = e[k], f[k], g[k], h[k], a[k]
        for j in range(CHUNK):
            p[j] = p[j] + e0 * a0[j]
            q[j] = q[j] + f0 * a0[j]
            r[j] = r[j] + g0 * a0[j]
            s[j] = s[j] + h0 * a0[j]
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
