"""NF4 on the GPU: the operations of `_nf4_cpu` in the same order, so that the bytes are the same.

bfloat16 is rounded by integer arithmetic and divisions are asked to be exact: neither is Triton's
default, in the compiler or in the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._tuning import Config

# 32 weights a thread are the 128 bits that a load or a store of codes may have; 16 leave room for more threads
QUANTIZE = (
    Config(WEIGHTS=4096, num_warps=4),
    Config(WEIGHTS=2048, num_warps=2),
    Config(WEIGHTS=2048, num_warps=4),
)
DEQUANTIZE = (
    Config(SIZE=4096, num_warps=4),
    Config(SIZE=8192, num_warps=8),
    Config(SIZE=2048, num_warps=2),
)
# a scale for every few weights takes registers
DEQUANTIZE_SMALL = (Config(SIZE=1024, num_warps=4), Config(SIZE=2048, num_warps=4))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def mix(x):  # type: ignore[no-untyped-def]
    """`_chance.mix`, on uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def code_of(x, table, k1, k2, index, CHANCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest entry's index, or by chance one of the two neighbours'."""
    code = tl.zeros_like(x).to(tl.int32)
    for k in tl.static_range(15):
        upper = tl.load(table + k + 1)
        bound = upper if CHANCE else (tl.load(table + k) + upper) * 0.5
        code += (x > bound).to(tl.int32)
    if CHANCE:
        low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
        h = mix(mix(low ^ k1.to(tl.uint32)) + (high ^ k2.to(tl.uint32)))
        u = (h >> 8).to(tl.float32) * (2.0**-24)
        below = tl.load(table + code)
        gap = tl.load(table + tl.minimum(code + 1, 15)) - below
        above = tl.minimum(tl.maximum(x, -1.0), 1.0) - below
        code += (u * gap < above).to(tl.int32)
    return code


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def bfloat_bits(x):  # type: ignore[no-untyped-def]
    """float32 to the nearest bfloat16, ties to even, as an int32 of its bits."""
    bits = x.to(tl.int32, bitcast=True)
    up = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(x == x, up >> 16, 0x7FC0)  # noqa: PLR0124 - nan alone differs from itself


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def largest_of(x0, x1, whole):  # type: ignore[no-untyped-def]
    """A block's scale from its even and odd weights; as integers, nan is larger than inf, than any number."""
    bits0 = x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits1 = x1.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = tl.max(tl.maximum(bits0, bits1), axis=1).to(tl.float32, bitcast=True)
    return tl.where((scale < 1e-38) & (whole == 0), 1e-38, scale)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def normalized(x0, x1, scale, whole, full):  # type: ignore[no-untyped-def]
    """By the reciprocal in whole blocks, a division in a short last one; `full` where all are whole."""
    scale = tl.where(tl.abs(scale) < 1e-38, 1e-38, scale)[:, None]
    inverse = tl.div_rn(tl.zeros_like(scale) + 1.0, scale)
    y0, y1 = x0 * inverse, x1 * inverse
    if not full:
        y0 = tl.where(whole[:, None], y0, tl.div_rn(x0, scale + tl.zeros_like(x0)))
        y1 = tl.where(whole[:, None], y1, tl.div_rn(x1, scale + tl.zeros_like(x1)))
    return y0, y1


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def span(n, half, BLOCK: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's first weight and its ROWS blocks; from there on their begins, their bytes, how many weights and bytes.

    All but the first two are of 32 bits. A mask that counts what lies side by side, up to what an argument
    says, is one that wide loads and stores may have.
    """
    start = tl.program_id(0).to(tl.int64) * (ROWS * BLOCK)
    each = tl.arange(0, ROWS)
    byte = each[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]  # [ROWS, BLOCK / 2]
    rest = tl.minimum(n - start, ROWS * BLOCK).to(tl.int32)
    stored = tl.minimum(half - start // 2, ROWS * BLOCK // 2).to(tl.int32)
    return start, start // BLOCK + each, each * BLOCK, byte, rest, stored


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def quantize(  # type: ignore[no-untyped-def]
    flat, absmax, codes, table, n, half, first, k1, k2,
    KEEP: tl.constexpr, CHANCE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS blocks a program; even and odd weights apart, since two make one of `half` bytes."""
    start, row, begin, byte, rest, stored = span(n, half, BLOCK, ROWS)
    index, even = begin[:, None] + tl.arange(0, BLOCK)[None, :], 2 * byte
    wide = tl.load(flat + start + index, mask=index < rest, other=0.0).to(tl.float32)
    x0, x1 = tl.split(tl.reshape(wide, (ROWS, BLOCK // 2, 2)))
    starts, whole = begin < rest, begin + BLOCK <= rest
    if KEEP:
        scale = tl.load(absmax + row, mask=starts, other=1.0)
    else:
        scale = largest_of(x0, x1, whole)
        tl.store(absmax + row, scale, mask=starts)
    x0, x1 = normalized(x0, x1, scale, whole, rest == ROWS * BLOCK)
    c0 = code_of(x0, table, k1, k2, first + start + even, CHANCE)
    c1 = code_of(x1, table, k1, k2, first + start + even + 1, CHANCE)
    tl.store(codes + start // 2 + byte, (c0 * 16 + c1).to(tl.uint8), mask=byte < stored)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def dequantize(  # type: ignore[no-untyped-def]
    codes, absmax, table, out, n, half,
    BLOCK: tl.constexpr, BFLOAT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE weights a program; a bfloat16 output comes as int16."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    byte = first // 2 + tl.arange(0, SIZE // 2)  # [SIZE / 2]
    packed = tl.load(codes + byte, mask=byte < half, other=0).to(tl.int32)
    w = tl.interleave(tl.load(table + (packed >> 4)), tl.load(table + (packed & 15)))
    if BLOCK >= SIZE:
        x = w * tl.load(absmax + first // BLOCK)
    else:
        block = first // BLOCK + tl.arange(0, SIZE // BLOCK)
        scale = tl.load(absmax + block, mask=block * BLOCK < n, other=0.0)
        x = tl.reshape(tl.reshape(w, (SIZE // BLOCK, BLOCK)) * scale[:, None], (SIZE,))
    index = first + tl.arange(0, SIZE)  # [SIZE]
    if BFLOAT:
        tl.store(out + index, bfloat_bits(x).to(tl.int16), mask=index < n)
    else:
        tl.store(out + index, x.to(out.dtype.element_ty), mask=index < n)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _total(x0, x1):  # type: ignore[no-untyped-def]
    """The sum of all squares, in float64."""
    x0, x1 = x0.to(tl.float64), x1.to(tl.float64)
    return tl.sum(tl.sum(x0 * x0 + x1 * x1, axis=1), axis=0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def error(  # type: ignore[no-untyped-def]
    flat, codes, absmax, table, sums, largest, n, half, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """ROWS blocks a program, and of them Σ e², Σ w² and max |e|, where e is what a code stands for less w."""
    start, row, begin, byte, rest, stored = span(n, half, BLOCK, ROWS)
    index = begin[:, None] + tl.arange(0, BLOCK)[None, :]
    mask0, mask1 = 2 * byte < rest, 2 * byte + 1 < rest
    packed = tl.load(codes + start // 2 + byte, mask=byte < stored, other=0).to(tl.int32)
    scale = tl.load(absmax + row, mask=begin < rest, other=0.0)[:, None]
    wide = tl.load(flat + start + index, mask=index < rest, other=0.0).to(tl.float32)
    w0, w1 = tl.split(tl.reshape(wide, (ROWS, BLOCK // 2, 2)))
    e0 = tl.where(mask0, tl.load(table + (packed >> 4)) * scale - w0, 0.0)
    e1 = tl.where(mask1, tl.load(table + (packed & 15)) * scale - w1, 0.0)
    at = sums + tl.program_id(0)
    tl.store(at, _total(e0, e1))
    tl.store(at + tl.num_programs(0), _total(w0, w1))
    most = tl.max(tl.max(tl.maximum(tl.abs(e0), tl.abs(e1)), axis=1), axis=0)
    tl.store(largest + tl.program_id(0), most)
