"""NF4's kernels as operators of torch; imported by `run` when it is given tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorasurgery.kernels import double_dequantize as un_nesting
from lorasurgery.kernels import double_quantize as nesting
from lorasurgery.kernels import nf4_dequantize as decoding
from lorasurgery.kernels import nf4_error as errors
from lorasurgery.kernels import nf4_matvec as products
from lorasurgery.kernels import nf4_quantize as encoding
from lorasurgery.kernels._operator import constant, measured


def _quantized(flat: Tensor, block: int, *_: Any) -> tuple[Tensor, Tensor]:
    n = flat.shape[0]
    codes = flat.new_empty(-(-n // 2), dtype=torch.uint8)
    return codes, flat.new_empty(-(-n // block), dtype=torch.float32)


nf4_quantize = constant(
    encoding,
    "(Tensor flat, int block, Tensor? absmax, SymInt? seed, SymInt offset) -> (Tensor, Tensor)",
    _quantized,
)


def _dequantized(
    codes: Tensor, absmax: Tensor, block: int, n: int, dtype: torch.dtype, table: Tensor  # noqa: ARG001
) -> Tensor:  # fmt: skip
    return codes.new_empty(n, dtype=dtype)


nf4_dequantize = constant(
    decoding,
    "(Tensor codes, Tensor absmax, int block, SymInt n, ScalarType dtype, Tensor table) -> Tensor",
    _dequantized,
)


def _nested(absmax: Tensor, threads: int) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    n = absmax.shape[0]
    q = absmax.new_empty(n, dtype=torch.uint8)
    return q, absmax.new_empty(-(-n // nesting.BLOCK)), absmax.new_empty(())


double_quantize = constant(
    nesting, "(Tensor absmax, int threads) -> (Tensor, Tensor, Tensor)", _nested
)


def _un_nested(q: Tensor, nested: Tensor, *_: Any) -> Tensor:
    return nested.new_empty(q.shape[0])


double_dequantize = constant(
    un_nesting, "(Tensor q, Tensor nested, Tensor offset, int block, Tensor table) -> Tensor", _un_nested
)  # fmt: skip


def _product(x: Tensor, *args: Any) -> Tensor:
    rows = args[3]
    return x.new_empty(x.shape[0], rows)


nf4_matvec = constant(
    products,
    "(Tensor x, Tensor codes, Tensor absmax, int block, SymInt rows, Tensor table) -> Tensor",
    _product,
)


def _error(flat: Tensor, *_: Any) -> Tensor:
    return flat.new_empty(3, dtype=torch.float64)


nf4_error = measured(
    errors, "(Tensor flat, Tensor codes, Tensor absmax, int block) -> Tensor", _error
)
