"""The moments of codes by block, in numba; float64, since what was made of a change is a small difference."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load
from lorasurgery.kernels._nf4_cpu import SPAN
from lorasurgery.kernels._nf4_lookup import look_up
from lorasurgery.kernels._numba import inner, jit, unordered

f4, f8, u8 = np.float32, np.float64, np.uint64


@jit
def moments(codes: Any, absmax: Any, block: Any, v: Any, d: Any, pairs: Any, out: Any) -> Any:
    """Fill out [blocks, 6], in the order of `nf4_moments`."""
    n = len(v)
    words, old = np.empty(SPAN // 2, u8), np.empty(SPAN, f4)
    for start in range(0, n, SPAN):
        size = min(SPAN, n - start)
        for j in range(size):
            old[j] = load(v[start + j])
        part = codes[start // 2 : (start + size + 1) // 2]
        first, last = start // block, (start + size + block - 1) // block
        change = d[start : start + size]
        measure((part, absmax[first:last], block), pairs, words, (old, change), out[first:last])


@inner
def measure(coded: Any, pairs: Any, words: Any, weights: Any, out: Any) -> Any:
    """Of one span: (codes, scales, block); `words` is room for its levels; (V, D)."""
    (codes, scales, block), (old, change) = coded, weights
    look_up(codes, pairs, words)
    levels = words.view(f4)
    for i in range(len(scales)):
        at, end = i * block, min((i + 1) * block, len(change))
        _sum(levels[at:end], f8(scales[i]), old[at:end], change[at:end], out[i])


@unordered
def _sum(levels: Any, scale: Any, old: Any, change: Any, out: Any) -> Any:
    ee = ed = dd = el = ll = ld = f8(0)
    for j in range(len(change)):
        level, d = f8(levels[j]), f8(change[j])
        e = level * scale - f8(old[j]) - d
        ee += e * e
        ed += e * d
        dd += d * d
        el += e * level
        ll += level * level
        ld += level * d
    out[0], out[1], out[2], out[3], out[4], out[5] = ee, ed, dd, el, ll, ld
