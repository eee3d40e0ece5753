"""Decode, add B A, encode on the GPU: what `_merge_nf4_cpu` computes, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._nf4_triton import bfloat_bits, code_of, largest_of, normalized, span
from lorasurgery.kernels._tuning import Config, of_32_threads

# 32 weights a thread have codes of 128 bits, and take most of its registers
WIDE = (Config(WEIGHTS=4096, num_warps=4), Config(WEIGHTS=8192, num_warps=8))
# 16 have 64: there is room for twice as many threads, and for what chance or float32 weights take
HALF = (Config(WEIGHTS=2048, num_warps=4), Config(WEIGHTS=1024, num_warps=2))
# where blocks run across rows each weight has an element of B to find, where they are small a scale, and where they
# are large their threads have to meet: 8 weights a thread, of 32 bits
NARROW = (Config(WEIGHTS=1024, num_warps=4), Config(WEIGHTS=512, num_warps=2))


def merge_configs(block: int, columns: int, crowded: bool) -> tuple[Config, ...]:
    """For each of the three merges of NF4; `crowded` by chance, or with dense weights of float32."""
    if columns % block or not 32 <= block <= 1024:
        return of_32_threads(NARROW)
    return of_32_threads(HALF if crowded else WIDE + HALF[:1])


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
def _delta(  # type: ignore[no-untyped-def]
    a, b, start, rest, columns, rank, WHOLE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Even and odd elements of B A from `start` on: sums over the rank in order, from -0.

    No block runs across the end of a row where WHOLE, and so an element of B serves all of a block.
    """
    begin, each = tl.arange(0, ROWS)[:, None] * BLOCK, tl.arange(0, BLOCK)[None, :]
    local = begin if WHOLE else begin + each  # [ROWS, 1] or [ROWS, BLOCK]
    # the row that a program begins in takes 64 bits, and what is counted from there 32
    row = start // columns
    place, wide = (local + (start - row * columns)).to(tl.uint32), tl.cast(columns, tl.uint32)
    below = place // wide
    # of a difference the compiler knows what divides it, which it has to for wide loads, of a remainder not
    column = (place - below * wide if WHOLE else place % wide).to(tl.int32)
    if WHOLE:
        column += each
    term_b, term_a = b + row * rank, a
    down, mask = below.to(tl.int32) * rank, begin + each < rest
    d = tl.zeros((ROWS, BLOCK), tl.float32) * -1.0
    for _ in range(rank):
        x = tl.load(term_a + column, mask=mask, other=0.0)
        d += tl.load(term_b + down, mask=local < rest, other=0.0) * x
        term_a += columns
        term_b += 1
    return tl.split(tl.reshape(d, (ROWS, BLOCK // 2, 2)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _sum(x):  # type: ignore[no-untyped-def]
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_sums(partial, made0, made1, d0, d1, mask0, mask1):  # type: ignore[no-untyped-def]
    """A program's sums over what was made and what was meant: of made · d, d² and (made - d)²."""
    # where there is no weight d is 0
    made0 = tl.where(mask0, made0, 0.0).to(tl.float64)
    made1 = tl.where(mask1, made1, 0.0).to(tl.float64)
    d0, d1 = d0.to(tl.float64), d1.to(tl.float64)
    noise0, noise1 = made0 - d0, made1 - d1
    at, programs = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(at, _sum(made0 * d0 + made1 * d1))
    tl.store(at + programs, _sum(d0 * d0 + d1 * d1))
    tl.store(at + 2 * programs, _sum(noise0 * noise0 + noise1 * noise1))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _moments(level, scale, old, d):  # type: ignore[no-untyped-def]
    level, d = level.to(tl.float64), d.to(tl.float64)
    e = level * scale - (old.to(tl.float64) + d)
    return (
        tl.sum(e * e, axis=1), tl.sum(e * d, axis=1), tl.sum(d * d, axis=1),
        tl.sum(e * level, axis=1), tl.sum(level * level, axis=1), tl.sum(level * d, axis=1),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def store_moments(moments, row, starts, scale, table, c0, c1, old0, old1, d0, d1):  # type: ignore[no-untyped-def]
    """Those of `nf4_moments`, ROWS blocks [ROWS, 6]; what lies beyond the last weight must be 0."""
    # one half after the other, in half the registers
    scale = scale.to(tl.float64)[:, None]
    even = _moments(tl.load(table + c0), scale, old0, d0)
    odd = _moments(tl.load(table + c1), scale, old1, d1)
    for i in tl.static_range(6):
        tl.store(moments + row * 6 + i, even[i] + odd[i], mask=starts)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def merge(  # type: ignore[no-untyped-def]
    codes, absmax, a, b, out, scales, moments, table, n, half, columns, rank, first, k1, k2,
    KEEP: tl.constexpr, CHANCE: tl.constexpr, DTYPE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program; even and odd weights apart, since two make a byte."""
    start, row, begin, byte, rest, stored = span(n, half, BLOCK, ROWS)
    even = 2 * byte
    mask0, mask1, starts, whole = even < rest, even + 1 < rest, begin < rest, begin + BLOCK <= rest
    d0, d1 = _delta(a, b, start, rest, columns, rank, WHOLE, BLOCK, ROWS)
    packed = tl.load(codes + start // 2 + byte, mask=byte < stored, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=starts, other=1.0)
    old0 = tl.where(mask0, _rounded(tl.load(table + (packed >> 4)) * scale[:, None], DTYPE), 0.0)
    old1 = tl.where(mask1, _rounded(tl.load(table + (packed & 15)) * scale[:, None], DTYPE), 0.0)
    x0, x1 = old0 + d0, old1 + d1
    if not KEEP:
        scale = largest_of(x0, x1, whole)
    tl.store(scales + row, scale, mask=starts)
    x0, x1 = normalized(x0, x1, scale, whole, rest == ROWS * BLOCK)
    c0 = code_of(x0, table, k1, k2, first + start + even, CHANCE)
    c1 = code_of(x1, table, k1, k2, first + start + even + 1, CHANCE)
    tl.store(out + start // 2 + byte, (c0 * 16 + c1).to(tl.uint8), mask=byte < stored)
    store_moments(moments, row, starts, scale, table, c0, c1, old0, old1, d0, d1)
