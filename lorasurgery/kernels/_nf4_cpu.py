"""NF4 in numba: codes of a tensor, the weights they stand for, and how far those are off.

A span of whole blocks is held in the first-level cache while it passes through a few simple loops,
each of which LLVM turns into vector code.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._chance_cpu import uniform
from lorasurgery.kernels._floats import load, nearest
from lorasurgery.kernels._nf4_count import cells, count_below
from lorasurgery.kernels._nf4_lookup import look_up
from lorasurgery.kernels._numba import inner, jit

SPAN = 4096  # weights; a multiple of every block size
LANES = 64  # running sums
TINY = np.float32(1e-38)  # a scale that is smaller counts as this

f4, u4, u8, i1 = np.float32, np.uint32, np.uint64, np.uint8


@jit
def quantize(flat: Any, block: Any, middles: Any, keep: Any, absmax: Any, codes: Any) -> Any:
    """Fill codes, and absmax unless `keep`, to the nearest level, given the middles between them."""
    n = len(flat)
    x, nibbles, found = np.empty(SPAN, f4), np.empty(SPAN, i1), cells(middles)
    for start in range(0, n, SPAN):
        size = min(SPAN, n - start)
        scales = absmax[start // block : (start + size + block - 1) // block]
        _normalize(flat[start : start + size], block, keep, scales, x)
        count_below(x, middles, found, nibbles)
        # the spare half of a last byte is the code of 0, as bitsandbytes pads
        if size % 2:
            nibbles[size] = 7
        _pack(nibbles, codes[start // 2 : (start + size + 1) // 2])


@jit
def quantize_by_chance(
    flat: Any, block: Any, levels: Any, keep: Any, absmax: Any, codes: Any, chance: Any
) -> Any:
    """The same to one of two neighbouring levels; `chance`: two keys and the first index.

    levels: float32 [2, 16], the levels and how far above each the next one is (0 for the last).
    """
    n, table = len(flat), levels[0]
    x, nibbles, found = np.empty(SPAN, f4), np.empty(SPAN, i1), cells(table[1:])
    for start in range(0, n, SPAN):
        size = min(SPAN, n - start)
        scales = absmax[start // block : (start + size + block - 1) // block]
        _normalize(flat[start : start + size], block, keep, scales, x)
        count_below(x, table[1:], found, nibbles)
        _raise_by_chance(x[:size], levels, chance, start, nibbles)
        if size % 2:
            nibbles[size] = 7
        _pack(nibbles, codes[start // 2 : (start + size + 1) // 2])


@jit
def dequantize(codes: Any, absmax: Any, block: Any, pairs: Any, out: Any) -> Any:
    """out[i] = round(table[code i] · absmax[i // block])."""
    n = len(out)
    values = np.empty(SPAN // 2, u8)
    x = values.view(f4)
    for start in range(0, n, SPAN):
        size = min(SPAN, n - start)
        look_up(codes[start // 2 : (start + size + 1) // 2], pairs, values)
        for at in range(0, size, block):
            scale = absmax[(start + at) // block]
            source, target = x[at:], out[start + at : start + min(at + block, size)]
            for j in range(len(target)):
                target[j] = nearest(target[j], source[j] * scale)


@jit
def error(flat: Any, codes: Any, absmax: Any, block: Any, pairs: Any) -> Any:
    """Σ (decoded - w)², Σ w², and the largest |decoded - w|."""
    n, width = len(flat), min(block, LANES)
    values, sums = np.empty(SPAN // 2, u8), np.zeros((3, LANES), f4)
    x = values.view(f4)
    error2 = norm2 = 0.0
    for start in range(0, n, SPAN):
        size = min(SPAN, n - start)
        look_up(codes[start // 2 : (start + size + 1) // 2], pairs, values)
        for at in range(0, size, width):
            scale = absmax[(start + at) // block]
            source = flat[start + at : start + min(at + width, size)]
            _compare(source, x[at : at + width], scale, sums)
        # a column has at most 64 terms in float32 (2048 in blocks of 2)
        for j in range(width):
            error2 += sums[0, j]
            norm2 += sums[1, j]
            sums[0, j] = sums[1, j] = f4(0)
    largest = f4(0)
    for j in range(width):
        largest = max(largest, sums[2, j])
    return error2, norm2, largest


@inner
def _normalize(flat: Any, block: Any, keep: Any, absmax: Any, x: Any) -> Any:
    """w / absmax: by the reciprocal in whole blocks, a division in a short last one.

    That is what bitsandbytes does, and the two differ in rare bits; so is the scale of a short block of zeros.
    """
    n = len(flat)
    for i in range(len(absmax)):
        at = i * block
        size = min(block, n - at)
        source, target = flat[at : at + size], x[at : at + size]
        if not keep:
            largest = u4(0)
            # as integers, nan is larger than inf, which is larger than any number
            for j in range(size):
                bits = u4(f4(load(source[j])).view(u4) & u4(0x7FFFFFFF))
                largest = max(largest, bits)
            absmax[i] = u4(largest).view(f4)
            if size < block and absmax[i] < TINY:
                absmax[i] = TINY
        scale = absmax[i]
        if abs(scale) < TINY:
            scale = TINY
        if size == block:
            inverse = f4(1) / scale
            for j in range(size):
                target[j] = load(source[j]) * inverse
        else:
            for j in range(size):
                target[j] = load(source[j]) / scale


@inner
def _raise_by_chance(x: Any, levels: Any, chance: Any, start: Any, nibbles: Any) -> Any:
    """From the level below x to the one above it, with odds of the distance from below."""
    table, gaps = levels[0], levels[1]
    first = chance[2] + u8(start)
    for j in range(len(x)):
        low = nibbles[j]
        u = f4(u4(uniform(chance, first + u8(j)) >> u4(8))) * f4(2.0**-24)
        above = min(max(x[j], f4(-1)), f4(1)) - table[low]
        nibbles[j] = low + i1(u * gaps[low] < above)


@inner
def _pack(nibbles: Any, codes: Any) -> Any:
    """The earlier weight of two in the high half."""
    for j in range(len(codes)):
        codes[j] = i1(i1(nibbles[2 * j] << 4) | nibbles[2 * j + 1])


@inner
def _compare(flat: Any, x: Any, scale: Any, sums: Any) -> Any:
    """Column by column, so that the order of each sum is fixed and vectors still serve."""
    error2, norm2, largest = sums[0], sums[1], sums[2]
    for j in range(len(flat)):
        w = load(flat[j])
        e = abs(x[j] * scale - w)
        error2[j] += e * e
        norm2[j] += w * w
        largest[j] = max(largest[j], e)
