"""W + B A to NF4, in numba: a few rows at a time, in spans that stay in the first-level cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load, nearest
from lorasurgery.kernels._lora_cpu import CHUNK, _four_rows, _take
from lorasurgery.kernels._moments_cpu import measure
from lorasurgery.kernels._nf4_count import cells, count_below
from lorasurgery.kernels._nf4_cpu import SPAN, _normalize, _pack, _raise_by_chance
from lorasurgery.kernels._nf4_lookup import look_up
from lorasurgery.kernels._numba import inner, jit

ROWS = 16  # that share a copied chunk of A

f4, u8, i1 = np.float32, np.uint64, np.uint8


@jit
def merge(base: Any, factors: Any, tables: Any, keep: Any, chance: Any, out: Any) -> Any:
    """Fill out's codes, scales and moments.

    Args:
        base: (packed, dense, seen, block). W is packed (codes, absmax, an array of the dtype that they
            decode to), or flat, the other is None; the moments take it for `seen`, None: for itself.
        factors: (a, b), float32 [r, columns] and [rows, r].
        tables: (pairs, middles, levels), as `quantize` and `dequantize` take them.
        keep: whether out's scales are given.
        chance: None, or two keys and the index of the first weight.
        out: (codes, absmax, moments).

    """
    (a, b), (packed, dense, seen, block) = factors, base
    rows, columns = len(b), a.shape[1]
    step = _step(columns, block)
    chunk, made = np.zeros((a.shape[0], CHUNK), f4), np.empty((4, CHUNK), f4)
    d, x, wide = np.empty(step * columns, f4), np.empty(SPAN, f4), np.empty(SPAN, f4)
    words, levels = np.empty(SPAN // 2, u8), np.empty(SPAN // 2, u8)
    nibbles, bounds = np.empty(SPAN + 1, i1), tables[1] if chance is None else tables[2][0][1:]
    found = cells(bounds)
    for top in range(0, rows, step):
        count = min(step, rows - top)
        _delta(a, b[top : top + count], chunk, made, d)
        for at in range(0, count * columns, SPAN):
            size = min(SPAN, count * columns - at)
            first, change = top * columns + at, d[at : at + size]
            old = words.view(f4)[:size]
            _decode(packed, block, tables[0], first, words, old)
            _take_over(dense, first, old)
            for j in range(size):
                wide[j] = old[j] + change[j]
            codes = out[0][first // 2 : (first + size + 1) // 2]
            here, end = first // block, (first + size + block - 1) // block
            scales, moments = out[1][here:end], out[2][here:end]
            _normalize(wide[:size], block, keep, scales, x)
            count_below(x, bounds, found, nibbles)
            if chance is not None:
                _raise_by_chance(x[:size], tables[2], chance, first, nibbles)
            if size % 2:
                nibbles[size] = 7
            _pack(nibbles, codes)
            _take_over(seen, first, old)
            measure((codes, scales, block), tables[0], levels, (old, change), moments)


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
def _decode(packed: Any, block: Any, pairs: Any, first: Any, words: Any, old: Any) -> Any:
    """The weights as the base's reader sees them: rounded to their dtype. None: as they were."""
    if packed is not None:
        codes, absmax, like = packed
        size = len(old)
        look_up(codes[first // 2 : (first + size + 1) // 2], pairs, words)
        for at in range(0, size, block):
            part, scale = old[at : at + block], absmax[(first + at) // block]
            for j in range(len(part)):
                part[j] = load(nearest(like[0], part[j] * scale))


@inner
def _take_over(dense: Any, first: Any, old: Any) -> Any:
    """The same, of weights as they are."""
    if dense is not None:
        source = dense[first : first + len(old)]
        for j in range(len(old)):
            old[j] = load(source[j])
