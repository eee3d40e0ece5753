"""Products with an NF4 weight W [n, k] on the GPU: x Wᵀ for one row and for many, and g W.

With LOW each adds a low-rank term, h Bᵀ or h A, to the same sums. Neighbouring programs read the same
weights, so that these come from memory once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._tile_triton import dot, odd_weights, rounded, weights


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tile(  # type: ignore[no-untyped-def]
    codes, absmax, table, nested, offset, levels, row, step, n, k, half, dtype: tl.constexpr,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ODD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if ODD:
        w = odd_weights(
            codes, absmax, table, nested, offset, levels, row, step, n, k,
            BLOCK, NESTED, COLUMNS,
        )  # fmt: skip
    else:
        w = weights(
            codes, absmax, table, nested, offset, levels, row, step, n, half,
            BLOCK, NESTED, ROWS, COLUMNS,
        )  # fmt: skip
    return rounded(w, dtype)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def matvec(  # type: ignore[no-untyped-def]
    x, codes, absmax, table, nested, offset, levels, bias, h, b, out, n, k, half, stride, rank,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ODD: tl.constexpr, BIAS: tl.constexpr,
    LOW: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """BN outputs of one row of x; sums of PART weights stay in a thread."""
    dtype = out.dtype.element_ty
    line = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    sums = tl.zeros((BN, BK // PART), tl.float32)
    for step in range(tl.cdiv(k, BK)):
        w = _tile(
            codes, absmax, table, nested, offset, levels, row, step, n, k, half, dtype,
            BLOCK, NESTED, ODD, BN, BK,
        )  # fmt: skip
        column = step * BK + tl.arange(0, BK)
        part = tl.load(x + line * stride + column, mask=column < k, other=0.0).to(tl.float32)
        terms = w.to(tl.float32) * part[None, :]
        sums += tl.sum(tl.reshape(terms, (BN, BK // PART, PART)), axis=2)
    y = tl.sum(sums, axis=1)
    if LOW:
        low = tl.zeros((BN,), tl.float32)
        for begin in range(0, rank, BR):
            term = begin + tl.arange(0, BR)
            mask = (row < n)[:, None] & (term < rank)[None, :]
            left = tl.load(b + row[:, None] * rank + term[None, :], mask=mask, other=0.0)
            right = tl.load(h + line * rank + term, mask=term < rank, other=0.0)
            low += tl.sum(left.to(tl.float32) * right.to(tl.float32)[None, :], axis=1)
        y += low
    if BIAS:
        y += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)
    tl.store(out + line * n + row, rounded(y, dtype), mask=row < n)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def forward(  # type: ignore[no-untyped-def]
    x, codes, absmax, table, nested, offset, levels, bias, h, b, out, m, n, k, half, stride, rank,
    span, BLOCK: tl.constexpr, NESTED: tl.constexpr, ODD: tl.constexpr, BIAS: tl.constexpr,
    LOW: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of x Wᵀ, computed as W xᵀ, so that the weights go from registers into the product.

    Programs along the last axis of the grid take `span` steps of BK columns of W each, and leave sums to be added.
    """
    dtype = x.dtype.element_ty
    line = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    row = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)  # [BN]
    split = tl.program_id(2)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(split * span, tl.minimum(tl.cdiv(k, BK), split * span + span)):
        w = _tile(
            codes, absmax, table, nested, offset, levels, row, step, n, k, half, dtype,
            BLOCK, NESTED, ODD, BN, BK,
        )  # fmt: skip
        column = step * BK + tl.arange(0, BK)
        mask = (column < k)[:, None] & (line < m)[None, :]
        part = tl.load(x + line[None, :] * stride + column[:, None], mask=mask, other=0.0)
        acc = dot(w, part, acc)
    if split == 0:
        if LOW:
            for begin in range(0, rank, BR):
                term = begin + tl.arange(0, BR)
                mask = (row < n)[:, None] & (term < rank)[None, :]
                left = tl.load(b + row[:, None] * rank + term[None, :], mask=mask, other=0.0)
                mask = (term < rank)[:, None] & (line < m)[None, :]
                right = tl.load(h + line[None, :] * rank + term[:, None], mask=mask, other=0.0)
                acc = dot(left, right, acc)
        if BIAS:
            acc += tl.load(bias + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    target = out + split.to(tl.int64) * m * n + line[None, :] * n + row[:, None]
    mask = (row < n)[:, None] & (line < m)[None, :]
    tl.store(target, rounded(acc, out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def backward(  # type: ignore[no-untyped-def]
    g, codes, absmax, table, nested, offset, levels, h, a, out, m, n, k, half, rank,
    BLOCK: tl.constexpr, NESTED: tl.constexpr, ODD: tl.constexpr,
    LOW: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile [BM, BK] of g W + h A."""
    dtype = g.dtype.element_ty
    line = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    step = tl.program_id(1)
    column = step * BK + tl.arange(0, BK)
    acc = tl.zeros((BM, BK), tl.float32)
    for start in range(0, n, BN):
        row = start + tl.arange(0, BN)
        w = _tile(
            codes, absmax, table, nested, offset, levels, row.to(tl.int64), step, n, k, half,
            dtype, BLOCK, NESTED, ODD, BN, BK,
        )  # fmt: skip
        mask = (line < m)[:, None] & (row < n)[None, :]
        part = tl.load(g + line[:, None] * n + row[None, :], mask=mask, other=0.0)
        acc = dot(part, w, acc)
    if LOW:
        for begin in range(0, rank, BR):
            term = begin + tl.arange(0, BR)
            mask = (line < m)[:, None] & (term < rank)[None, :]
            left = tl.load(h + line[:, None] * rank + term[None, :], mask=mask, other=0.0)
            mask = (term < rank)[:, None] & (column < k)[None, :]
            right = tl.load(
                a + term.to(tl.int64)[:, None] * k + column[None, :], mask=mask, other=0.0
            )
            acc = dot(left, right, acc)
    mask = (line < m)[:, None] & (column < k)[None, :]
    tl.store(out + line[:, None] * k + column[None, :], rounded(acc, dtype), mask=mask)
