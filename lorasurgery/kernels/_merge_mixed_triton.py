"""W + B A on the GPU where one side is NF4 and the other dense: decoded, added, rounded; or added, encoded."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._merge_nf4_triton import _delta, _rounded, _sum
from lorasurgery.kernels._merge_triton import _float
from lorasurgery.kernels._merge_triton import _rounded as _narrow
from lorasurgery.kernels._nf4_triton import code_of, largest_of, normalized
from lorasurgery.kernels._tuning import Config

# WEIGHTS of a program, or a block's if that has more
MERGE = (
    Config(WEIGHTS=1024, num_warps=4),
    Config(WEIGHTS=2048, num_warps=8),
    Config(WEIGHTS=512, num_warps=4),
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _store(partial, made0, made1, d0, d1, mask0, mask1):  # type: ignore[no-untyped-def]
    """A program's sums over what was made and what was meant: of made · d, d² and (made - d)²."""
    made0, made1 = made0.to(tl.float64), made1.to(tl.float64)
    d0, d1 = d0.to(tl.float64), d1.to(tl.float64)
    noise0, noise1 = made0 - d0, made1 - d1
    at, programs = partial + tl.program_id(0), tl.num_programs(0)
    tl.store(at, _sum(made0 * d0, mask0) + _sum(made1 * d1, mask1))
    tl.store(at + programs, _sum(d0 * d0, mask0) + _sum(d1 * d1, mask1))
    tl.store(at + 2 * programs, _sum(noise0 * noise0, mask0) + _sum(noise1 * noise1, mask1))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def decode_merge(  # type: ignore[no-untyped-def]
    codes, absmax, a, b, out, partial, table, n, half, columns, rank, first, k1, k2,
    DTYPE: tl.constexpr, KIND: tl.constexpr, CHANCE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """NF4 to dense, ROWS blocks a program; even and odd weights apart, since two make a byte."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    place = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK / 2]
    even = 2 * place
    mask0, mask1 = even < n, even + 1 < n
    packed = tl.load(codes + place, mask=place < half, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=row * BLOCK < n, other=1.0)
    old0 = _rounded(tl.load(table + (packed >> 4)) * scale[:, None], DTYPE)
    old1 = _rounded(tl.load(table + (packed & 15)) * scale[:, None], DTYPE)
    d0 = _delta(a, b, even, mask0, columns, rank)
    d1 = _delta(a, b, even + 1, mask1, columns, rank)
    y0 = _narrow(old0 + d0, first + even, k1, k2, KIND, CHANCE)
    y1 = _narrow(old1 + d1, first + even + 1, k1, k2, KIND, CHANCE)
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out + index, tl.interleave(y0, y1), mask=index < n)
    if KIND == "float16" and CHANCE:
        new0 = y0.to(tl.float16, bitcast=True).to(tl.float32)
        new1 = y1.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        new0, new1 = _float(y0, KIND == "bfloat16"), _float(y1, KIND == "bfloat16")
    _store(partial, new0 - old0, new1 - old1, d0, d1, mask0, mask1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def encode_merge(  # type: ignore[no-untyped-def]
    w, absmax, a, b, codes, scales, partial, table, n, half, columns, rank, first, k1, k2,
    BFLOAT: tl.constexpr, KEEP: tl.constexpr, CHANCE: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Dense to NF4, the same way."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    place = row[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK / 2]
    even = 2 * place
    mask0, mask1, starts = even < n, even + 1 < n, row * BLOCK < n
    whole = row * BLOCK + BLOCK <= n
    index = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    wide = _float(tl.load(w + index, mask=index < n, other=0), BFLOAT)
    old0, old1 = tl.split(tl.reshape(wide, (ROWS, BLOCK // 2, 2)))
    d0 = _delta(a, b, even, mask0, columns, rank)
    d1 = _delta(a, b, even + 1, mask1, columns, rank)
    x0, x1 = tl.where(mask0, old0 + d0, 0.0), tl.where(mask1, old1 + d1, 0.0)
    scale = tl.load(absmax + row, mask=starts, other=1.0) if KEEP else largest_of(x0, x1, whole)
    tl.store(scales + row, scale, mask=starts)
    c0 = code_of(normalized(x0, scale, whole), table, k1, k2, first + even, CHANCE)
    c1 = code_of(normalized(x1, scale, whole), table, k1, k2, first + even + 1, CHANCE)
    tl.store(codes + place, (c0 * 16 + c1).to(tl.uint8), mask=place < half)
    new0, new1 = tl.load(table + c0) * scale[:, None], tl.load(table + c1) * scale[:, None]
    _store(partial, new0 - old0, new1 - old1, d0, d1, mask0, mask1)
