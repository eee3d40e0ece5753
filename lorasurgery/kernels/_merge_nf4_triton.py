"""Decode, add B A, encode on the GPU: what `_merge_nf4_cpu` computes, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._nf4_triton import bfloat_bits, code_of, largest_of, normalized
from lorasurgery.kernels._tuning import Config

# WEIGHTS of a program, or a block's if that has more. With the 32 a thread that fill a load of 128 bits of codes,
# the sums of B A take 252 registers and more, and spill: neighbouring threads' loads make whole lines all the same
MERGE = (
    Config(WEIGHTS=512, num_warps=4),
    Config(WEIGHTS=1024, num_warps=4),
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 by way of the dtype that weights decode to."""
    if DTYPE == "bfloat16":
        return (bfloat_bits(x) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":  # noqa: RET505 - Triton compiles one branch of these
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _delta(a, b, index, mask, columns, rank):  # type: ignore[no-untyped-def]
    """Elements of B A by their flat index: the sum over the rank in order, from -0."""
    term_a, term_b = a + index % columns, b + index // columns * rank
    d = tl.zeros_like(index).to(tl.float32) * -1.0
    for _ in range(rank):
        d += tl.load(term_b, mask=mask, other=0.0) * tl.load(term_a, mask=mask, other=0.0)
        term_a += columns
        term_b += 1
    return d


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum(x, mask):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(tl.where(mask, x, 0.0), axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_moments(moments, row, starts, scale, level0, level1, old0, old1, d0, d1):  # type: ignore[no-untyped-def]
    """Those of `nf4_moments`, ROWS blocks [ROWS, 6]; what lies beyond the last weight must be 0."""
    level0, level1 = level0.to(tl.float64), level1.to(tl.float64)
    d0, d1, s = d0.to(tl.float64), d1.to(tl.float64), scale.to(tl.float64)[:, None]
    e0, e1 = level0 * s - (old0.to(tl.float64) + d0), level1 * s - (old1.to(tl.float64) + d1)
    at = moments + row * 6
    tl.store(at, tl.sum(e0 * e0 + e1 * e1, axis=1), mask=starts)
    tl.store(at + 1, tl.sum(e0 * d0 + e1 * d1, axis=1), mask=starts)
    tl.store(at + 2, tl.sum(d0 * d0 + d1 * d1, axis=1), mask=starts)
    tl.store(at + 3, tl.sum(e0 * level0 + e1 * level1, axis=1), mask=starts)
    tl.store(at + 4, tl.sum(level0 * level0 + level1 * level1, axis=1), mask=starts)
    tl.store(at + 5, tl.sum(level0 * d0 + level1 * d1, axis=1), mask=starts)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def merge(  # type: ignore[no-untyped-def]
    codes, absmax, a, b, packed, scales, moments, table, n, columns, rank, first, k1, k2,
    KEEP: tl.constexpr, CHANCE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program; even and odd weights apart, since two make a byte."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    even = row[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK / 2]
    mask0, mask1, starts = even < n, even + 1 < n, row * BLOCK < n
    whole = row * BLOCK + BLOCK <= n
    place = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = tl.load(codes + place, mask=mask0, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=starts, other=1.0)
    old0 = tl.where(mask0, _rounded(tl.load(table + (byte >> 4)) * scale[:, None], DTYPE), 0.0)
    old1 = tl.where(mask1, _rounded(tl.load(table + (byte & 15)) * scale[:, None], DTYPE), 0.0)
    d0 = _delta(a, b, even, mask0, columns, rank)
    d1 = _delta(a, b, even + 1, mask1, columns, rank)
    x0, x1 = old0 + d0, old1 + d1
    if not KEEP:
        scale = largest_of(x0, x1, whole)
    tl.store(scales + row, scale, mask=starts)
    c0 = code_of(normalized(x0, scale, whole), table, k1, k2, first + even, CHANCE)
    c1 = code_of(normalized(x1, scale, whole), table, k1, k2, first + even + 1, CHANCE)
    tl.store(packed + place, (c0 * 16 + c1).to(tl.uint8), mask=mask0)
    level0, level1 = tl.load(table + c0), tl.load(table + c1)
    store_moments(moments, row, starts, scale, level0, level1, old0, old1, d0, d1)
