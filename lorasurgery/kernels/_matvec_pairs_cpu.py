"""x · dequant(W)ᵀ of a bfloat16 x in numba: products are exact, and the order of sums is that of AVX512-BF16.

Of every 64 weights 16 lanes take four neighbours each, the third before the first, the fourth before the second, into sums
of even and of odd weights; every other 64 have sums of their own. In the end the 64 sums are added by halves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._floats import load
from lorasurgery.kernels._matvec_cpu import LANES, by_halves, decode
from lorasurgery.kernels._nf4_pairs import PAIRED, STEP, row
from lorasurgery.kernels._numba import inner, jit

f4, u2, u8 = np.float32, np.uint16, np.uint64


@jit
def matvec_pairs(
    codes: Any, absmax: Any, block: Any, pairs: Any, x: Any, first: Any, out: Any
) -> Any:  # fmt: skip
    """As `matvec`, of x uint16 [m, in], which stands for bfloat16."""
    n = x.shape[1]
    if PAIRED and n % block == 0 and block % STEP == 0:
        _paired(codes, (absmax, block), pairs, x, first, out)
    else:
        _one_by_one(codes, (absmax, block), pairs, x, first, out)


@inner
def _paired(codes: Any, scales: Any, pairs: Any, x: Any, first: Any, out: Any) -> Any:
    (absmax, block), (m, n) = scales, x.shape
    # the first 16 words are the pairs of level 0 with each level
    table, apart = pairs.view(f4)[1:32:2].copy(), np.empty((m, n), u2)
    sums, shift = np.empty(LANES, f4), 0
    while STEP << shift < block:
        shift += 1
    for k in range(m):
        for at in range(0, n, STEP):
            for j in range(STEP // 2):
                apart[k, at + j] = x[k, at + 2 * j]
                apart[k, at + STEP // 2 + j] = x[k, at + 2 * j + 1]
    for i in range(out.shape[1]):
        start = (first + i) * n
        here = absmax[start // block : (start + n) // block], table
        for k in range(m):
            row(codes[start // 2 : (start + n) // 2], here, apart[k], (n // STEP, shift), sums)
            out[k, i] = by_halves(sums)


@inner
def _one_by_one(codes: Any, scales: Any, pairs: Any, x: Any, first: Any, out: Any) -> Any:
    (absmax, block), (m, n) = scales, x.shape
    padded = (n + STEP - 1) // STEP * STEP
    values, sums, wide = np.zeros(padded // 2, u8), np.empty(LANES, f4), np.zeros((m, padded), f4)
    w = values.view(f4)
    for k in range(m):
        for j in range(n):
            wide[k, j] = load(x[k, j])
    for i in range(out.shape[1]):
        decode(codes, (absmax, block), pairs, x, (first + i) * n, values)
        for k in range(m):
            out[k, i] = _dot(w, wide[k], sums)


@inner
def _dot(w: Any, x: Any, sums: Any) -> Any:
    for k in range(LANES):
        sums[k] = f4(0)
    for at in range(0, len(w), STEP):
        own = sums[32:] if at // STEP % 2 else sums[:32]
        for k in range(16):
            even, odd = at + 4 * k, at + 4 * k + 1
            own[k] = own[k] + w[even + 2] * x[even + 2] + w[even] * x[even]
            own[16 + k] = own[16 + k] + w[odd + 2] * x[odd + 2] + w[odd] * x[odd]
    return by_halves(sums)
