"""W + B A on the GPU where one side is NF4 and the other dense: decoded, added, rounded; or added, encoded."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._merge_nf4_triton import _delta, _rounded, store_moments, store_sums
from lorasurgery.kernels._merge_triton import _float
from lorasurgery.kernels._merge_triton import _rounded as _narrow
from lorasurgery.kernels._nf4_triton import code_of, largest_of, normalized, span


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode_merge(  # type: ignore[no-untyped-def]
    codes, absmax, a, b, out, partial, table, n, half, columns, rank, first, k1, k2,
    DTYPE: tl.constexpr, KIND: tl.constexpr, CHANCE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """NF4 to dense, ROWS blocks a program; even and odd weights apart, since two make a byte."""
    start, row, begin, byte, rest, stored = span(n, half, BLOCK, ROWS)
    index, even = begin[:, None] + tl.arange(0, BLOCK)[None, :], 2 * byte
    mask0, mask1 = even < rest, even + 1 < rest
    d0, d1 = _delta(a, b, start, rest, columns, rank, WHOLE, BLOCK, ROWS)
    packed = tl.load(codes + start // 2 + byte, mask=byte < stored, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=begin < rest, other=1.0)
    old0 = _rounded(tl.load(table + (packed >> 4)) * scale[:, None], DTYPE)
    old1 = _rounded(tl.load(table + (packed & 15)) * scale[:, None], DTYPE)
    y0 = _narrow(old0 + d0, first + start + even, k1, k2, KIND, CHANCE)
    y1 = _narrow(old1 + d1, first + start + even + 1, k1, k2, KIND, CHANCE)
    tl.store(out + start + index, tl.interleave(y0, y1), mask=index < rest)
    if KIND == "float16" and CHANCE:
        new0 = y0.to(tl.float16, bitcast=True).to(tl.float32)
        new1 = y1.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        new0, new1 = _float(y0, KIND == "bfloat16"), _float(y1, KIND == "bfloat16")
    store_sums(partial, new0 - old0, new1 - old1, d0, d1, mask0, mask1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def encode_merge(  # type: ignore[no-untyped-def]
    w, seen, absmax, a, b, codes, scales, moments, table, n, half, columns, rank, first, k1, k2,
    BFLOAT: tl.constexpr, SEEN: tl.constexpr, SEEN_BFLOAT: tl.constexpr, KEEP: tl.constexpr,
    CHANCE: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Dense to NF4, the same way; the moments take `seen` for the weights if SEEN."""
    start, row, begin, byte, rest, stored = span(n, half, BLOCK, ROWS)
    index, even = begin[:, None] + tl.arange(0, BLOCK)[None, :], 2 * byte
    mask0, mask1, starts, whole = even < rest, even + 1 < rest, begin < rest, begin + BLOCK <= rest
    d0, d1 = _delta(a, b, start, rest, columns, rank, WHOLE, BLOCK, ROWS)
    wide = _float(tl.load(w + start + index, mask=index < rest, other=0), BFLOAT)
    old0, old1 = tl.split(tl.reshape(wide, (ROWS, BLOCK // 2, 2)))
    x0, x1 = tl.where(mask0, old0 + d0, 0.0), tl.where(mask1, old1 + d1, 0.0)
    scale = tl.load(absmax + row, mask=starts, other=1.0) if KEEP else largest_of(x0, x1, whole)
    tl.store(scales + row, scale, mask=starts)
    x0, x1 = normalized(x0, x1, scale, whole, rest == ROWS * BLOCK)
    c0 = code_of(x0, table, k1, k2, first + start + even, CHANCE)
    c1 = code_of(x1, table, k1, k2, first + start + even + 1, CHANCE)
    tl.store(codes + start // 2 + byte, (c0 * 16 + c1).to(tl.uint8), mask=byte < stored)
    if SEEN:
        base = _float(tl.load(seen + start + index, mask=index < rest, other=0), SEEN_BFLOAT)
        old0, old1 = tl.split(tl.reshape(base, (ROWS, BLOCK // 2, 2)))
    store_moments(moments, row, starts, scale, table, c0, c1, old0, old1, d0, d1)
