"""x · dequant(W)ᵀ of a bfloat16 x in numba: products are exact, and the order of sums is that of AVX512-BF16."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._matvec_cpu import LANES, by_halves, one_by_one
from lorasurgery.kernels._nf4_pairs import PAIRED, STEP, row
from lorasurgery.kernels._numba import inner, jit

f4, u2 = np.float32, np.uint16


@jit
def matvec_pairs(
    codes: Any, absmax: Any, block: Any, pairs: Any, x: Any, first: Any, out: Any
) -> Any:  # fmt: skip
    """As `matvec`, of x uint16 [m, in], which stands for bfloat16."""
    n = x.shape[1]
    if PAIRED and n % block == 0 and block % STEP == 0:
        _paired(codes, (absmax, block), pairs, x, first, out)
    else:
        one_by_one(codes, (absmax, block), pairs, x, first, out, True)


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
