"""W' = round(m / ‖V‖ · V) with V = W + B A, in numba.

A band of rows is made chunk by chunk as in _lora_cpu, with its V kept; when its norms are known, V is near at
hand, in the second-level cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lorasurgery.kernels._chance_cpu import uniform
from lorasurgery.kernels._floats import by_chance, load, nearest
from lorasurgery.kernels._lora_cpu import CHUNK, _measure, _take, _two_rows
from lorasurgery.kernels._numba import inner, jit

BAND = 16  # rows

f4, f8, u8 = np.float32, np.float64, np.uint64


@jit
def merge(w: Any, factors: Any, m: Any, out: Any, chance: Any) -> Any:
    """As _lora_cpu's merge, with factors (a, b), and d = out's exact value - w."""
    a, b = factors
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((2, CHUNK), f4)
    v, squares = np.empty((BAND, columns), f4), np.empty((BAND, CHUNK), f8)
    sums = np.zeros((3, CHUNK), f4)
    signal = power = noise2 = 0.0
    for first in range(0, rows, BAND):
        band = min(BAND, rows - first)
        squares[:] = 0.0
        for start in range(0, columns, CHUNK):
            _take(a, start, chunk)
            for i in range(band):
                if i % 2 == 0:
                    _two_rows(b[first + i], b[min(first + i + 1, rows - 1)], chunk, d[0], d[1])
                source = w[first + i, start : start + CHUNK]
                _moved(source, d[i % 2], v[i, start : start + CHUNK], squares[i])
        for i in range(band):
            norm = f4(math.sqrt(squares[i].sum()))
            gain = m[first + i] / (norm if norm != f4(0) else f4(1))
            for start in range(0, columns, CHUNK):
                source, target = (
                    w[first + i, start : start + CHUNK],
                    out[first + i, start : start + CHUNK],
                )
                at = u8(first + i) * u8(columns) + u8(start)
                _scale(source, v[i, start : start + CHUNK], gain, d[0])
                _round(v[i, start : start + CHUNK], gain, target, chance, at)
                _measure(source, target, d[0], sums)
        for j in range(CHUNK):
            signal += sums[0, j]
            power += sums[1, j]
            noise2 += sums[2, j]
            sums[0, j] = sums[1, j] = sums[2, j] = f4(0)
    return signal, power, noise2


@inner
def _moved(source: Any, d: Any, v: Any, squares: Any) -> Any:
    for j in range(len(source)):
        x = load(source[j]) + d[j]
        v[j] = x
        squares[j] += f8(x) * f8(x)


@inner
def _scale(source: Any, v: Any, gain: Any, d: Any) -> Any:
    for j in range(len(source)):
        d[j] = gain * v[j] - load(source[j])


@inner
def _round(v: Any, gain: Any, target: Any, chance: Any, first: Any) -> Any:
    if chance is None:
        for j in range(len(v)):
            target[j] = nearest(target[j], gain * v[j])
    else:
        first = first + chance[2]
        for j in range(len(v)):
            h = uniform(chance, first + u8(j))
            target[j] = by_chance(target[j], gain * v[j], h)
