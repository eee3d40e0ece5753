"""x · dequant(W)ᵀ in numba: a row of W is decoded in the first-level cache and used for each row of x.

Products and sums are float32, each rounded, in an order that no processor and no thread changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load, nearest
from lorasurgery.kernels._nf4_lookup import WIDE, look_up
from lorasurgery.kernels._nf4_wide import gather, row, spread
from lorasurgery.kernels._numba import inner, jit

LANES = 64  # running sums

f4, u8 = np.float32, np.uint64


@jit
def matvec(
    codes: Any, absmax: Any, block: Any, pairs: Any, x: Any, first: Any, out: Any
) -> Any:  # fmt: skip
    """out[k, i] = Σ over j of x[k, j] · w[first + i, j]; x [m, in] not empty, out float32 [m, rows]."""
    n = x.shape[1]
    if WIDE and n % block == 0 and block % LANES == 0:
        _wide(codes, (absmax, block), pairs, x, first, out)
        return
    one_by_one(codes, (absmax, block), pairs, x, first, out, False)


@inner
def one_by_one(
    codes: Any, scales: Any, pairs: Any, x: Any, first: Any, out: Any, paired: Any
) -> Any:  # fmt: skip
    """A row of W at a time, decoded and padded to whole lanes."""
    m, n = x.shape
    padded = (n + LANES - 1) // LANES * LANES
    values, sums, wide = np.zeros(padded // 2, u8), np.empty(LANES, f4), np.zeros((m, padded), f4)
    for k in range(m):
        for j in range(n):
            wide[k, j] = load(x[k, j])
    for i in range(out.shape[1]):
        decode(codes, scales, pairs, x, (first + i) * n, values)
        for k in range(m):
            if paired:
                out[k, i] = _dot_of_pairs(values.view(f4), wide[k], sums)
            else:
                out[k, i] = _dot(values.view(f4), wide[k], sums)


@inner
def _wide(codes: Any, scales: Any, pairs: Any, x: Any, first: Any, out: Any) -> Any:
    """The same by permutations: a scaled table for each block takes the place of decoded weights."""
    (absmax, block), (m, n) = scales, x.shape
    # the first 16 words are the pairs of level 0 with each level
    blocks, table = n // block, pairs.view(f4)[1:32:2].copy()
    plain, apart = np.empty(n, f4), np.empty((m, n), f4)
    mixed, sums, size = np.empty(LANES, f4), np.empty(LANES, f4), (blocks, block // LANES)
    for k in range(m):
        for j in range(n):
            plain[j] = load(x[k, j])
        spread(plain, apart[k])
    for i in range(out.shape[1]):
        start = (first + i) * n
        here = absmax[start // block : (start + n) // block], table, x
        for k in range(m):
            row(codes[start // 2 : (start + n) // 2], here, apart[k], size, mixed)
            gather(mixed, sums)
            out[k, i] = by_halves(sums)


@inner
def decode(codes: Any, scales: Any, pairs: Any, x: Any, start: Any, values: Any) -> Any:
    """The weights from `start` on that a row of x [m, in] meets, as pairs of float32 rounded to x's dtype."""
    (absmax, block), n, w = scales, x.shape[1], values.view(f4)
    if n % 2 == 0 and n % block == 0:
        look_up(codes[start // 2 : (start + n) // 2], pairs, values)
        _scale(w[:n], absmax[start // block : (start + n) // block], block, x)
    else:
        _decode_across(codes, absmax, block, pairs.view(f4), start, w[:n])
        _round(w[:n], x)


@inner
def _scale(w: Any, absmax: Any, block: Any, x: Any) -> Any:
    """Loops of a fixed length, where blocks are no shorter, become vector code without a remainder."""
    if block >= LANES:
        for at in range(0, len(w), LANES):
            part, scale = w[at : at + LANES], absmax[at // block]
            for j in range(LANES):
                part[j] = load(nearest(x[0, 0], part[j] * scale))
    else:
        for j in range(len(w)):
            w[j] *= absmax[j // block]
        _round(w, x)


@inner
def _round(w: Any, x: Any) -> Any:
    """To the dtype of x, as weights that were dequantized beforehand are."""
    for j in range(len(w)):
        w[j] = load(nearest(x[0, 0], w[j]))


@inner
def _decode_across(codes: Any, absmax: Any, block: Any, levels: Any, start: Any, w: Any) -> Any:
    """Where rows begin inside of blocks, or of bytes."""
    for j in range(len(w)):
        at = start + j
        # the word of a byte holds its two weights in order
        w[j] = levels[2 * codes[at // 2] + at % 2] * absmax[at // block]


@inner
def _dot(w: Any, x: Any, sums: Any) -> Any:
    """Lane by lane, and then the lanes by halves."""
    at, n = 0, len(w)
    for k in range(LANES):
        sums[k] = f4(0)
    while at + 4 * LANES <= n:
        a, b = w[at : at + 4 * LANES], x[at : at + 4 * LANES]
        for k in range(LANES):
            two = sums[k] + a[k] * b[k] + a[k + LANES] * b[k + LANES]
            three = two + a[k + 2 * LANES] * b[k + 2 * LANES]
            sums[k] = three + a[k + 3 * LANES] * b[k + 3 * LANES]
        at += 4 * LANES
    while at < n:
        a, b = w[at : at + LANES], x[at : at + LANES]
        for k in range(LANES):
            sums[k] += a[k] * b[k]
        at += LANES
    return by_halves(sums)


@inner
def _dot_of_pairs(w: Any, x: Any, sums: Any) -> Any:
    """Of every 64 products 16 lanes take four neighbours each: the third, then the first, and the fourth, then the second.

    Those are sums of even and of odd ones, and every other 64 have sums of their own.
    """
    for k in range(LANES):
        sums[k] = f4(0)
    for at in range(0, len(w), LANES):
        own = sums[32:] if at // LANES % 2 else sums[:32]
        for k in range(16):
            even, odd = at + 4 * k, at + 4 * k + 1
            own[k] = own[k] + w[even + 2] * x[even + 2] + w[even] * x[even]
            own[16 + k] = own[16 + k] + w[odd + 2] * x[odd + 2] + w[odd] * x[odd]
    return by_halves(sums)


@inner
def by_halves(sums: Any) -> Any:
    """The sum of 64 numbers, in place."""
    width = LANES // 2
    while width:
        for k in range(width):
            sums[k] += sums[k + width]
        width //= 2
    return sums[0]
