"""What the matrix kernels on the GPU share: a tile of weights out of NF4, rounding, and the dot product.

Triton's interpreter truncates to bfloat16, and multiplies its bits as if they were integers; where it
interprets, both are done in float32 instead, with the roundings that a GPU makes.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to `dtype`, to the nearest."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, up, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)  # noqa: PLR0124
    else:
        y = x.to(dtype)
    return y


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a b, summed in float32; float32 factors are not cut to tf32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scales(  # type: ignore[no-untyped-def]
    absmax, nested, offset, levels, index, mask, NESTED: tl.constexpr
):
    """The block scales at `index`; NESTED of them share a scale of the second level, or 0: none."""
    scale = tl.load(absmax + index, mask=mask, other=0)
    if NESTED:
        outer = tl.load(nested + index // NESTED, mask=mask, other=0.0)
        scale = tl.load(levels + scale.to(tl.int32)) * outer + tl.load(offset)
    return scale


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def weights(  # type: ignore[no-untyped-def]
    codes, absmax, table, nested, offset, levels, row, step, n, half,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, COLUMNS] of a weight [n, 2 · half] whose rows are whole blocks.

    `row` is int64 [ROWS]; columns begin at step · COLUMNS, and so the compiler sees their alignment.
    """
    byte = step * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)  # [COLUMNS / 2]
    first = step * COLUMNS
    mask = (row < n)[:, None] & (byte < half)[None, :]
    packed = tl.load(codes + row[:, None] * half + byte[None, :], mask=mask, other=0).to(tl.int32)
    w = tl.interleave(tl.load(table + (packed >> 4)), tl.load(table + (packed & 15)))
    blocks = 2 * half // BLOCK  # in a row
    if BLOCK >= COLUMNS:
        index = row * blocks + first // BLOCK  # [ROWS]
        inside = (row < n) & (first < 2 * half)
        w *= _scales(absmax, nested, offset, levels, index, inside, NESTED)[:, None]
    else:
        # one scale is loaded for each block, not for each weight
        group = first // BLOCK + tl.arange(0, COLUMNS // BLOCK)
        index = row[:, None] * blocks + group[None, :]  # [ROWS, COLUMNS / BLOCK]
        inside = (row < n)[:, None] & (group < blocks)[None, :]
        scale = _scales(absmax, nested, offset, levels, index, inside, NESTED)
        w = tl.reshape(w, (ROWS, COLUMNS // BLOCK, BLOCK)) * scale[:, :, None]
        w = tl.reshape(w, (ROWS, COLUMNS))
    return w


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def odd_weights(  # type: ignore[no-untyped-def]
    codes, absmax, table, nested, offset, levels, row, step, n, k,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same where blocks run across the ends of rows, even bytes may: weight by weight."""
    column = step * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < n)[:, None] & (column < k)[None, :]
    index = row[:, None] * k + column[None, :]
    packed = tl.load(codes + index // 2, mask=mask, other=0).to(tl.int32)
    code = tl.where(index % 2 == 0, packed >> 4, packed & 15)
    scale = _scales(absmax, nested, offset, levels, index // BLOCK, mask, NESTED)
    return tl.where(mask, tl.load(table + code) * scale, 0.0)
