"""The second level of NF4's scales on the GPU, in the operations of `_double_cpu`."""

from __future__ import annotations

import triton
import triton.language as tl

from lorasurgery.kernels._tuning import Config

QUANTIZE = (Config(num_warps=4), Config(num_warps=2), Config(num_warps=8))
DEQUANTIZE = (
    Config(SIZE=1024, num_warps=4),
    Config(SIZE=2048, num_warps=4),
    Config(SIZE=4096, num_warps=8),
)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def quantize(  # type: ignore[no-untyped-def]
    absmax, offset, positions, q, nested, n, BLOCK: tl.constexpr
):
    """A block of scales a program; float64 stands for the one rounding of a fused multiply-add."""
    row = tl.program_id(0).to(tl.int64)
    index = row * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = index < n
    centred = tl.load(absmax + index, mask=mask, other=0.0) - tl.load(offset)
    centred = tl.where(mask, centred, 0.0)
    largest = tl.max(tl.abs(centred), axis=0)
    tl.store(nested + row, largest)
    one = tl.full((BLOCK,), 1.0, tl.float32)
    x = centred * tl.div_rn(one, largest + tl.zeros_like(one))
    x = (tl.minimum(tl.maximum(x, -1.0), 1.0) + 1.0) * 0.5
    at = (x.to(tl.float64) * 65535.0 + 0.5).to(tl.float32)
    # nan: 0 times the reciprocal of a number too small to have one
    code = tl.load(positions + tl.where(at >= 0.0, at, 0.0).to(tl.int32))
    tl.store(q + index, tl.where(largest > 0.0, code, 0), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def dequantize(  # type: ignore[no-untyped-def]
    q, nested, table, offset, out, n, BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """SIZE scales a program; launched without fusion, for product and sum round each."""
    index = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)  # [SIZE]
    mask = index < n
    value = tl.load(table + tl.load(q + index, mask=mask, other=0).to(tl.int32))
    scale = tl.load(nested + index // BLOCK, mask=mask, other=0.0)
    tl.store(out + index, value * scale + tl.load(offset), mask=mask)
