"""DoRA in numba: norms of rows of W + B A, a chunk of columns at a time; and the scaled output."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load, nearest
from lorasurgery.kernels._lora_cpu import CHUNK, _four_rows, _take
from lorasurgery.kernels._numba import inner, jit

LANES = 64  # running sums

f4, f8 = np.float32, np.float64


@jit
def row_norms(w: Any, a: Any, b: Any, out: Any) -> Any:
    """out[i] = ‖w[i] + d[i]‖ with d = B A as `delta` sums it; squares and their sums are float64."""
    rows, columns = w.shape
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    squares, total = np.empty(LANES, f8), np.zeros(rows, f8)
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 4 == 0:
                _four_rows(b, i, chunk, d)
            total[i] += _squares(w[i, start : start + n], d[i % 4], squares)
    for i in range(rows):
        out[i] = f4(np.sqrt(total[i]))


@inner
def _squares(w: Any, d: Any, lanes: Any) -> Any:
    for k in range(LANES):
        lanes[k] = f8(0)
    for at in range(0, len(w), LANES):
        source, change = w[at : at + LANES], d[at : at + LANES]
        for k in range(len(source)):
            x = f8(f4(load(source[k]) + change[k]))
            lanes[k] += x * x
    width = LANES // 2
    while width:
        for k in range(width):
            lanes[k] += lanes[k + width]
        width //= 2
    return lanes[0]


@jit
def column_norms(w: Any, a: Any, b: Any, begin: Any, end: Any, out: Any) -> Any:
    """out[j] = ‖w[:, j] + d[:, j]‖ for the columns from `begin` to `end`."""
    rows = len(w)
    chunk, d = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    total = np.empty(CHUNK, f8)
    for start in range(begin, end, CHUNK):
        n = min(CHUNK, end - start)
        _take(a, start, chunk)
        total[:] = 0
        for i in range(rows):
            if i % 4 == 0:
                _four_rows(b, i, chunk, d)
            source, change = w[i, start : start + n], d[i % 4]
            for j in range(n):
                x = f8(f4(load(source[j]) + change[j]))
                total[j] += x * x
        for j in range(n):
            out[start + j] = f4(np.sqrt(total[j]))


@jit
def scaled(base: Any, lora: Any, scale: Any, out: Any) -> Any:
    """out = round((base + lora) · scale), column by column; all [n, out] but scale; lora may be None."""
    for i in range(len(base)):
        x, target = base[i], out[i]
        if lora is None:
            for j in range(len(x)):
                target[j] = nearest(target[j], load(x[j]) * scale[j])
        else:
            y = lora[i]
            for j in range(len(x)):
                target[j] = nearest(target[j], (load(x[j]) + load(y[j])) * scale[j])


@jit
def scaled_backward(g: Any, base: Any, lora: Any, scale: Any, out: Any, sums: Any) -> Any:
    """out = round(g · scale), and sums[j] += g · (base + lora) down each column, in float64."""
    for i in range(len(base)):
        seen, x, target = g[i], base[i], out[i]
        for j in range(len(x)):
            target[j] = nearest(target[j], load(seen[j]) * scale[j])
        if lora is None:
            for j in range(len(x)):
                sums[j] += f8(f4(load(seen[j]) * load(x[j])))
        else:
            y = lora[i]
            for j in range(len(x)):
                sums[j] += f8(f4(load(seen[j]) * f4(load(x[j]) + load(y[j]))))
