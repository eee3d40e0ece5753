"""Many adapters on the GPU: shrink (h = s · x Aᵀ) and expand (y = base + h Bᵀ) over factors in pages.

For rows that each have an adapter of their own, and for tiles of rows that share one. A program whose rank or
rows lie beyond what its adapter has leaves at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._tile_triton import dot, rounded


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _factor(  # type: ignore[no-untyped-def]
    pool, pages, first, count, start, width, per,
    PAGE: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Rank vectors first, ..., of `count`, and of each the elements from `start` on: [BR, BW]."""
    vector = tl.arange(0, BR)
    column = start + tl.arange(0, BW)
    mask = (vector < count)[:, None] & (column < width)[None, :]
    index = (first.to(tl.int64) + vector) * per  # of the vector's first page
    if PAGE % BW == 0:
        page = tl.load(pages + index + start // PAGE, mask=vector < count, other=0)
        place = page.to(tl.int64)[:, None] * PAGE + (start % PAGE + tl.arange(0, BW))[None, :]
    else:
        page = tl.load(pages + index[:, None] + (column // PAGE)[None, :], mask=mask, other=0)
        place = page.to(tl.int64) * PAGE + (column % PAGE)[None, :]
    return tl.load(pool + place, mask=mask, other=0.0)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def shrink_rows(  # type: ignore[no-untyped-def]
    x, adapter, pool, starts, scales, pages, h, adapters, k, stride, rank, per,
    PAGE: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BR elements of one row of h."""
    line = tl.program_id(0).to(tl.int64)
    which = tl.load(adapter + line)
    if (which >= 0) & (which < adapters):
        first = tl.load(starts + which) + tl.program_id(1) * BR
        count = tl.load(starts + which + 1) - first
        if count > 0:
            sums = tl.zeros((BR, BW), tl.float32)
            for start in range(0, k, BW):
                factor = _factor(pool, pages, first, count, start, k, per, PAGE, BR, BW)
                column = start + tl.arange(0, BW)
                part = tl.load(x + line * stride + column, mask=column < k, other=0.0)
                sums += factor.to(tl.float32) * part.to(tl.float32)[None, :]
            value = rounded(tl.load(scales + which) * tl.sum(sums, axis=1), h.dtype.element_ty)
            vector = tl.arange(0, BR)
            target = h + line * rank + tl.program_id(1) * BR + vector
            tl.store(target, value, mask=vector < count)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expand_rows(  # type: ignore[no-untyped-def]
    h, adapter, pool, starts, pages, base, out, adapters, n, rank, per,
    PAGE: tl.constexpr, BASE: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """BW outputs of one row."""
    line = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BW
    column = start + tl.arange(0, BW)
    y = tl.zeros((BW,), tl.float32)
    if BASE:
        y += tl.load(base + line * n + column, mask=column < n, other=0.0).to(tl.float32)
    which = tl.load(adapter + line)
    if (which >= 0) & (which < adapters):
        first = tl.load(starts + which)
        total = tl.load(starts + which + 1) - first
        for begin in range(0, total, BR):
            factor = _factor(pool, pages, first + begin, total - begin, start, n, per, PAGE, BR, BW)
            vector = begin + tl.arange(0, BR)
            part = tl.load(h + line * rank + vector, mask=vector < total, other=0.0)
            y += tl.sum(factor.to(tl.float32) * part.to(tl.float32)[:, None], axis=0)
    tl.store(out + line * n + column, rounded(y, out.dtype.element_ty), mask=column < n)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def shrink_tiles(  # type: ignore[no-untyped-def]
    x, order, tiles, pool, starts, scales, pages, h, k, stride, rank, per,
    PAGE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BR] of h: rows `order`[begin:end] share an adapter, or have none (-1)."""
    tile = tiles + tl.program_id(0) * 3
    which, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (which >= 0) & (begin < end):
        first = tl.load(starts + which) + tl.program_id(1) * BR
        count = tl.load(starts + which + 1) - first
        if count > 0:
            member = begin + tl.arange(0, BM)
            line = tl.load(order + member, mask=member < end, other=0).to(tl.int64)
            sums = tl.zeros((BM, BR), tl.float32)
            for start in range(0, k, BW):
                factor = _factor(pool, pages, first, count, start, k, per, PAGE, BR, BW)
                column = start + tl.arange(0, BW)
                mask = (member < end)[:, None] & (column < k)[None, :]
                part = tl.load(x + line[:, None] * stride + column[None, :], mask=mask, other=0.0)
                sums = dot(part, tl.trans(factor), sums)
            vector = tl.arange(0, BR)
            target = h + line[:, None] * rank + (tl.program_id(1) * BR + vector)[None, :]
            mask = (member < end)[:, None] & (vector < count)[None, :]
            value = rounded(tl.load(scales + which) * sums, h.dtype.element_ty)
            tl.store(target, value, mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def expand_tiles(  # type: ignore[no-untyped-def]
    h, order, tiles, pool, starts, pages, base, out, n, rank, per,
    PAGE: tl.constexpr, BASE: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BW] of outputs."""
    tile = tiles + tl.program_id(0) * 3
    which, first_line, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first_line < end:
        member = first_line + tl.arange(0, BM)
        line = tl.load(order + member, mask=member < end, other=0).to(tl.int64)
        start = tl.program_id(1) * BW
        column = start + tl.arange(0, BW)
        inside = (member < end)[:, None] & (column < n)[None, :]
        y = tl.zeros((BM, BW), tl.float32)
        first, total = 0, 0
        if which >= 0:
            first = tl.load(starts + which)
            total = tl.load(starts + which + 1) - first
        for begin in range(0, total, BR):
            factor = _factor(pool, pages, first + begin, total - begin, start, n, per, PAGE, BR, BW)
            vector = begin + tl.arange(0, BR)
            mask = (member < end)[:, None] & (vector < total)[None, :]
            part = tl.load(h + line[:, None] * rank + vector[None, :], mask=mask, other=0.0)
            y = dot(part, factor, y)
        place = line[:, None] * n + column[None, :]
        if BASE:
            y += tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, rounded(y, out.dtype.element_ty), mask=inside)
