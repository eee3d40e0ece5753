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
from lorasurgery.kernels._lora_cpu import CHUNK, _four_rows, _take
from lorasurgery.kernels._numba import inner, jit
from lorasurgery.kernels.dora_merge import LANES

BAND = 16  # rows

f4, f8, u8 = np.float32, np.float64, np.uint64


@jit
def merge(w: Any, factors: Any, m: Any, out: Any, chance: Any) -> Any:
    """As _lora_cpu's merge, with factors (a, b), and d = out's exact value - w."""
    a, b = factors
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    v, squares = np.empty((BAND, columns), f4), np.empty((BAND, LANES), f8)
    sums = np.zeros((3, CHUNK), f4)
    signal = power = noise2 = 0.0
    for first in range(0, rows, BAND):
        band = min(BAND, rows - first)
        squares[:] = 0.0
        for start in range(0, columns, CHUNK):
            _take(a, start, chunk)
            for i in range(band):
                if i % 4 == 0:
                    _four_rows(b, first + i, chunk, d)
                source = w[first + i, start : start + CHUNK]
                _moved(source, d[i % 4], v[i, start : start + CHUNK], squares[i])
        for i in range(band):
            norm = f4(math.sqrt(_total(squares[i])))
            gain = m[first + i] / (norm if norm != f4(0) else f4(1))
            for start in range(0, columns, CHUNK):
                source, target = (
                    w[first + i, start : start + CHUNK],
                    out[first + i, start : start + CHUNK],
                )
                at = u8(first + i) * u8(columns) + u8(start)
                _scaled(source, v[i, start : start + CHUNK], gain, target, chance, at, sums)
        for j in range(CHUNK):
            signal += sums[0, j]
            power += sums[1, j]
            noise2 += sums[2, j]
            sums[0, j] = sums[1, j] = sums[2, j] = f4(0)
    return signal, power, noise2


@inner
def _moved(source: Any, d: Any, v: Any, squares: Any) -> Any:
    """V, and its squares in LANES sums: of a whole chunk, four are added to each at a time."""
    if len(source) == CHUNK:
        for k in range(LANES):
            total = squares[k]
            for part in range(4):
                j = part * LANES + k
                x = load(source[j]) + d[j]
                v[j] = x
                total += f8(x) * f8(x)
            squares[k] = total
        return
    for j in range(len(source)):
        x = load(source[j]) + d[j]
        v[j] = x
        squares[j % LANES] += f8(x) * f8(x)


@inner
def _total(lanes: Any) -> Any:
    """By halves: a sum in order would wait for each of its steps."""
    width = LANES // 2
    while width:
        for k in range(width):
            lanes[k] += lanes[k + width]
        width //= 2
    return lanes[0]


@inner
def _scaled(source: Any, v: Any, gain: Any, target: Any, chance: Any, first: Any, sums: Any) -> Any:
    signal, power, noise2 = sums[0], sums[1], sums[2]
    if chance is not None:
        first = first + chance[2]
    for j in range(len(v)):
        w, total = load(source[j]), gain * v[j]
        if chance is None:
            target[j] = nearest(target[j], total)
        else:
            target[j] = by_chance(target[j], total, uniform(chance, first + u8(j)))
        d, change = total - w, load(target[j]) - w
        signal[j] += change * d
        power[j] += d * d
        noise2[j] += (change - d) * (change - d)
