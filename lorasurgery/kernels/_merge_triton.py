"""W + B A on the GPU, rounded once, with what rounding kept; W dense or in NF4, read once.

The operations of `_lora_cpu` in the same order; the sums of a program are float32 by halves, all others float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._nf4_triton import bfloat_bits, mix
from lorasurgery.kernels._tuning import Config

MERGE = (
    Config(ROWS=8, COLUMNS=128, num_warps=4),
    Config(ROWS=4, COLUMNS=256, num_warps=4),
    Config(ROWS=16, COLUMNS=128, num_warps=8),
)
GAINS = (
    Config(ROWS=8, num_warps=4),
    Config(ROWS=4, num_warps=2),
    Config(ROWS=16, num_warps=8),
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _float(x, BFLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What was loaded, a bfloat16 as the int16 of its bits, in float32."""
    if BFLOAT:
        return (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - Triton compiles one branch of these
        return x.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _half_by_chance(x, h):  # type: ignore[no-untyped-def]
    """The bits of a float16, as int32: `_chance.rounded`."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = (size - (112 << 23) + (h & 0x1FFF).to(tl.int32)) >> 13
    # below 2^-14 the grid has steps of 2^-24
    steps = tl.minimum(size.to(tl.float32, bitcast=True), 2.0**-14) * (2.0**24)
    whole = steps.to(tl.int32)
    up = (h >> 8).to(tl.float32) * (2.0**-24) < steps - whole.to(tl.float32)
    code = tl.where(size < 0x38800000, whole + up.to(tl.int32), normal)
    code = tl.where(size >= 0x47800000, 0x7C00, code)
    code = tl.where(size > 0x7F800000, 0x7E00, code)
    return code | ((bits >> 16) & 0x8000)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rounded(x, index, k1, k2, KIND: tl.constexpr, CHANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """To the nearest, or by chance; a bfloat16, and by chance a float16, as the int16 of its bits."""
    if CHANCE:
        low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
        h = mix(mix(low ^ k1.to(tl.uint32)) + (high ^ k2.to(tl.uint32)))
    if KIND == "bfloat16":
        if CHANCE:
            up = (x.to(tl.uint32, bitcast=True) + (h & 0xFFFF)) >> 16
            y = tl.where(x == x, up.to(tl.int32), 0x7FC0).to(tl.int16)  # noqa: PLR0124
        else:
            y = bfloat_bits(x).to(tl.int16)
    elif KIND == "float16":
        y = _half_by_chance(x, h).to(tl.int16) if CHANCE else x.to(tl.float16)
    else:
        y = x
    return y


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def products(  # type: ignore[no-untyped-def]
    a, b, row, column, starts, inside, columns, rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile of B A, summed over the rank in order; -0 is what a sum may begin with and leave no trace."""
    d = tl.zeros((ROWS, COLUMNS), tl.float32) * -1.0
    term_a, term_b = a + column, b + row * rank
    for _ in range(rank):
        x = tl.load(term_a, mask=inside, other=0.0)
        y = tl.load(term_b, mask=starts, other=0.0)
        d += y[:, None] * x[None, :]
        term_a += columns
        term_b += 1
    return d


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def merge(  # type: ignore[no-untyped-def]
    w, a, b, gain, out, partial, rows, columns, rank, first, k1, k2,
    GAIN: tl.constexpr, BFLOAT: tl.constexpr, KIND: tl.constexpr, CHANCE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS x COLUMNS elements a program, and its sums over c = out - w: of c · d, d² and (c - d)².

    With GAIN, a row of w + B A is scaled by its gain, and d is what is meant to be added in all.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside, starts = column < columns, row < rows
    mask = starts[:, None] & inside[None, :]
    index = row[:, None] * columns + column[None, :]
    d = products(a, b, row, column, starts, inside, columns, rank, ROWS, COLUMNS)
    wide = _float(tl.load(w + index, mask=mask, other=0), BFLOAT)
    total = wide + d
    if GAIN:
        total = tl.load(gain + row, mask=starts, other=0.0)[:, None] * total
        d = total - wide
    y = _rounded(total, first + index, k1, k2, KIND, CHANCE)
    tl.store(out + index, y, mask=mask)
    if KIND == "float16" and CHANCE:
        made = y.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        made = _float(y, KIND == "bfloat16")
    change = made - wide
    terms = tl.where(mask, change * d, 0.0)
    powers = tl.where(mask, d * d, 0.0)
    noises = tl.where(mask, (change - d) * (change - d), 0.0)
    at = partial + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    tl.store(at, tl.sum(tl.sum(terms, axis=1), axis=0).to(tl.float64))
    tl.store(at + programs, tl.sum(tl.sum(powers, axis=1), axis=0).to(tl.float64))
    tl.store(at + 2 * programs, tl.sum(tl.sum(noises, axis=1), axis=0).to(tl.float64))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def gains(  # type: ignore[no-untyped-def]
    w, a, b, m, out, rows, columns, rank,
    BFLOAT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, HALVINGS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program: m / ‖V‖ with V = w + B A; squares are summed in LANES, and these by halves."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    starts = row < rows
    lanes = tl.zeros((ROWS, LANES), tl.float64)
    for start in range(0, columns, LANES):
        column = start + tl.arange(0, LANES)  # [LANES]
        inside = column < columns
        mask = starts[:, None] & inside[None, :]
        d = products(a, b, row, column, starts, inside, columns, rank, ROWS, LANES)
        at = w + row[:, None] * columns + column[None, :]
        wide = _float(tl.load(at, mask=mask, other=0), BFLOAT)
        v = tl.where(mask, wide + d, 0.0).to(tl.float64)
        lanes += v * v
    for i in tl.static_range(HALVINGS):
        lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, LANES >> (i + 1))), axis=1)
    norm = tl.sqrt(tl.reshape(lanes, (ROWS,))).to(tl.float32)
    size = tl.load(m + row, mask=starts, other=0.0)
    tl.store(out + row, tl.div_rn(size, tl.where(norm == 0.0, 1.0, norm)), mask=starts)
