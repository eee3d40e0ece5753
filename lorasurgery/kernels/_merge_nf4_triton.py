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
    Config(WEIGHTS=2048, num_warps=8),
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
def merge(  # type: ignore[no-untyped-def]
    codes, absmax, a, b, out, scales, partial, table, n, half, columns, rank, first, k1, k2,
    KEEP: tl.constexpr, CHANCE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program; even and odd weights apart, since two make a byte."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    even = row[:, None] * BLOCK + 2 * tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK / 2]
    mask0, mask1, starts = even < n, even + 1 < n, row * BLOCK < n
    whole = row * BLOCK + BLOCK <= n
    place = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    packed = tl.load(codes + place, mask=place < half, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=starts, other=1.0)
    old0 = _rounded(tl.load(table + (packed >> 4)) * scale[:, None], DTYPE)
    old1 = _rounded(tl.load(table + (packed & 15)) * scale[:, None], DTYPE)
    d0 = _delta(a, b, even, mask0, columns, rank)
    d1 = _delta(a, b, even + 1, mask1, columns, rank)
    x0, x1 = tl.where(mask0, old0 + d0, 0.0), tl.where(mask1, old1 + d1, 0.0)
    if not KEEP:
        scale = largest_of(x0, x1, whole)
    tl.store(scales + row, scale, mask=starts)
    c0 = code_of(normalized(x0, scale, whole), table, k1, k2, first + even, CHANCE)
    c1 = code_of(normalized(x1, scale, whole), table, k1, k2, first + even + 1, CHANCE)
    tl.store(out + place, (c0 * 16 + c1).to(tl.uint8), mask=place < half)
    made0 = (tl.load(table + c0) * scale[:, None] - old0).to(tl.float64)
    made1 = (tl.load(table + c1) * scale[:, None] - old1).to(tl.float64)
    d0, d1 = d0.to(tl.float64), d1.to(tl.float64)
    at, programs = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(at, _sum(made0 * d0, mask0) + _sum(made1 * d1, mask1))
    tl.store(at + programs, _sum(d0 * d0, mask0) + _sum(d1 * d1, mask1))
    noise0, noise1 = made0 - d0, made1 - d1
    tl.store(at + 2 * programs, _sum(noise0 * noise0, mask0) + _sum(noise1 * noise1, mask1))
