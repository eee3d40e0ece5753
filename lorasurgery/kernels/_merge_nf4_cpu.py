"""Decode, add B A, encode, in numba: a few rows at a time, in spans that stay in the first-level cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load, nearest
from lorasurgery.kernels._lora_cpu import CHUNK, _four_rows, _take
from lorasurgery.kernels._nf4_count import cells, count_below
from lorasurgery.kernels._nf4_cpu import SPAN, _normalize, _pack, _raise_by_chance
from lorasurgery.kernels._nf4_lookup import look_up
from lorasurgery.kernels._numba import inner, jit

ROWS = 16  # that share a copied chunk of A
LANES = 64  # running sums

f4, f8, u8, i1 = np.float32, np.float64, np.uint64, np.uint8


@jit
def merge(base: Any, factors: Any, tables: Any, keep: Any, chance: Any, out: Any) -> Any:
    """Fill out's codes and scales; returns Σ made·d, Σ d² and Σ (made - d)², made = new - old.

    Args:
        base: (codes, absmax, block, an array of the dtype that weights decode to).
        factors: (a, b), float32 [r, columns] and [rows, r].
        tables: (pairs, middles, levels), as `quantize` and `dequantize` take them.
        keep: whether out's scales are given.
        chance: None, or two keys and the index of the first weight.
        out: (codes, absmax).

    """
    (a, b), block = factors, base[2]
    rows, columns = len(b), a.shape[1]
    step = _step(columns, block)
    d, sums = np.empty(step * columns, f4), np.zeros((3, LANES), f8)
    chunk, made = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    x, wide, nibbles = np.empty(SPAN, f4), np.empty(SPAN, f4), np.empty(SPAN + 1, i1)
    values = np.empty(SPAN // 2, u8)
    bounds = tables[1] if chance is None else tables[2][0][1:]
    found = cells(bounds)
    for top in range(0, rows, step):
        count = min(step, rows - top)
        _delta(a, b[top : top + count], chunk, made, d)
        for at in range(0, count * columns, SPAN):
            size = min(SPAN, count * columns - at)
            first, change = top * columns + at, d[at : at + size]
            old = values.view(f4)[:size]
            _decode(base, tables[0], first, values, old)
            for j in range(size):
                wide[j] = old[j] + change[j]
            scales = out[1][first // block : (first + size + block - 1) // block]
            _normalize(wide[:size], block, keep, scales, x)
            count_below(x, bounds, found, nibbles)
            if chance is not None:
                _raise_by_chance(x[:size], tables[2], chance, first, nibbles)
            if size % 2:
                nibbles[size] = 7
            _pack(nibbles, out[0][first // 2 : (first + size + 1) // 2])
            _measure(nibbles, (tables[2][0], scales, block), old, change, sums)
    return sums[0].sum(), sums[1].sum(), sums[2].sum()


@inner
def _step(columns: Any, block: Any) -> Any:
    """Rows whose end is the end of a block, wherever they begin; some, to make use of a chunk."""
    x, y = max(columns, 1), block
    while y:
        x, y = y, x % y
    step = block // x
    return step * max(1, ROWS // step)


@inner
def _delta(a: Any, b: Any, chunk: Any, made: Any, d: Any) -> Any:
    rows, columns = len(b), a.shape[1]
    for start in range(0, columns, CHUNK):
        n = min(CHUNK, columns - start)
        _take(a, start, chunk)
        for i in range(rows):
            if i % 4 == 0:
                _four_rows(b, i, chunk, made)
            source, at = made[i % 4], i * columns + start
            target = d[at : at + n]
            for j in range(n):
                target[j] = source[j]


@inner
def _decode(base: Any, pairs: Any, first: Any, values: Any, old: Any) -> Any:
    """The weights as the base's reader sees them: rounded to their dtype."""
    codes, absmax, block, like = base
    size = len(old)
    look_up(codes[first // 2 : (first + size + 1) // 2], pairs, values)
    for at in range(0, size, block):
        part, scale = old[at : at + block], absmax[(first + at) // block]
        for j in range(len(part)):
            part[j] = load(nearest(like[0], part[j] * scale))


@inner
def _measure(nibbles: Any, new: Any, old: Any, change: Any, sums: Any) -> Any:
    """In float64: what was made of a change is the small difference of two weights."""
    table, absmax, block = new
    width = min(block, LANES)
    signal, power, noise2 = sums[0], sums[1], sums[2]
    for at in range(0, len(old), width):
        scale = absmax[at // block]
        before, wanted, code = old[at : at + width], change[at : at + width], nibbles[at:]
        for j in range(len(before)):
            made = f8(f4(table[code[j]] * scale) - before[j])
            d = f8(wanted[j])
            signal[j] += made * d
            power[j] += d * d
            noise2[j] += (made - d) * (made - d)
