"""DoRA on the GPU: the operations of `_dora_cpu`, each rounded by itself (no fused multiply-add)."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._nf4_triton import bfloat_bits


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def row_norms(  # type: ignore[no-untyped-def]
    w, a, b, out, rows, columns, rank, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS rows a program; W is read once, W + B A lives in registers alone."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    starts = row < rows
    total = tl.zeros((ROWS,), tl.float64)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)  # [COLUMNS]
        mask = starts[:, None] & (column < columns)[None, :]
        # -0 is what a sum may begin with and leave no trace
        d = tl.zeros((ROWS, COLUMNS), tl.float32) * -1.0
        term_a, term_b = a + column, b + row * rank
        for _ in range(rank):
            x = tl.load(term_a, mask=column < columns, other=0.0)
            y = tl.load(term_b, mask=starts, other=0.0)
            d += y[:, None] * x[None, :]
            term_a += columns
            term_b += 1
        at = w + row[:, None] * columns + column[None, :]
        wide = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        merged = tl.where(mask, wide + d, 0.0).to(tl.float64)
        total += tl.sum(merged * merged, axis=1)
    tl.store(out + row, tl.sqrt(total).to(tl.float32), mask=starts)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def column_norms(  # type: ignore[no-untyped-def]
    w, a, b, partial, rows, columns, rank, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Squares of COLUMNS columns, summed over `span` steps of ROWS rows: partial[program of rows]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = column < columns
    total = tl.zeros((COLUMNS,), tl.float64)
    first = tl.program_id(1) * span
    for step in range(first, tl.minimum(first + span, tl.cdiv(rows, ROWS))):
        row = step * ROWS + tl.arange(0, ROWS).to(tl.int64)  # [ROWS]
        mask = (row < rows)[:, None] & inside[None, :]
        d = tl.zeros((ROWS, COLUMNS), tl.float32) * -1.0
        term_a, term_b = a + column, b + row * rank
        for _ in range(rank):
            x = tl.load(term_a, mask=inside, other=0.0)
            y = tl.load(term_b, mask=row < rows, other=0.0)
            d += y[:, None] * x[None, :]
            term_a += columns
            term_b += 1
        at = w + row[:, None] * columns + column[None, :]
        wide = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        merged = tl.where(mask, wide + d, 0.0).to(tl.float64)
        total += tl.sum(merged * merged, axis=0)
    tl.store(partial + tl.program_id(1).to(tl.int64) * columns + column, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scaled(  # type: ignore[no-untyped-def]
    base, lora, scale, out, n, columns,
    LORA: tl.constexpr, BFLOAT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """SIZE elements a program; a bfloat16 output comes as int16, to round it to the nearest."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # [SIZE]
    mask = index < n
    x = tl.load(base + index, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        x += tl.load(lora + index, mask=mask, other=0.0).to(tl.float32)
    v = x * tl.load(scale + index % columns, mask=mask, other=0.0)
    if BFLOAT:
        tl.store(out + index, bfloat_bits(v).to(tl.int16), mask=mask)
    else:
        tl.store(out + index, v.to(out.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scaled_backward(  # type: ignore[no-untyped-def]
    g, base, lora, scale, out, partial, rows, columns,
    LORA: tl.constexpr, BFLOAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of g · scale, and its sums of g · (base + lora) over the rows: partial[program of rows]."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    index = row[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    seen = tl.load(g + index, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(base + index, mask=mask, other=0.0).to(tl.float32)
    if LORA:
        x += tl.load(lora + index, mask=mask, other=0.0).to(tl.float32)
    v = seen * tl.load(scale + column, mask=column < columns, other=0.0)[None, :]
    if BFLOAT:
        tl.store(out + index, bfloat_bits(v).to(tl.int16), mask=mask)
    else:
        tl.store(out + index, v.to(out.dtype.element_ty), mask=mask)
    # a masked product may be 0 times inf
    terms = tl.where(mask, seen * x, 0.0).to(tl.float64)
    at = partial + tl.program_id(0).to(tl.int64) * columns + column
    tl.store(at, tl.sum(terms, axis=0), mask=column < columns)
