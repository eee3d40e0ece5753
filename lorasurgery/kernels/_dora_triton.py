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
def scaled(  # type: ignore[no-untyped-def]
    base, lora, scale, out, n, columns, BFLOAT: tl.constexpr, SIZE: tl.constexpr
):
    """SIZE elements a program; a bfloat16 output comes as int16, to round it to the nearest."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # [SIZE]
    mask = index < n
    x = tl.load(base + index, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(lora + index, mask=mask, other=0.0).to(tl.float32)
    v = (x + y) * tl.load(scale + index % columns, mask=mask, other=0.0)
    if BFLOAT:
        tl.store(out + index, bfloat_bits(v).to(tl.int16), mask=mask)
    else:
        tl.store(out + index, v.to(out.dtype.element_ty), mask=mask)
