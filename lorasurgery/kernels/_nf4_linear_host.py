"""NF4 products of CPU tensors: weights unpacked by numba, and multiplied by torch.

numpy's threads wait in a loop for more, on the processors that torch's need for what comes next: a
training step whose products alternate between the two took twice as long.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lorasurgery.kernels import double_dequantize, nf4_dequantize
from lorasurgery.kernels._packed import Packed


def forward(x: Tensor, w: Packed, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias [m, rows] in x's dtype."""
    weight = _dense(w, x.shape[1], x.dtype)
    if x.dtype == torch.float16:  # which most processors can't add up
        return functional.linear(x.float(), weight.float(), _wide(bias)).to(x.dtype)
    return functional.linear(x, weight, bias)


def backward(g: Tensor, k: int, w: Packed) -> Tensor:
    """The gradient for x: g W [m, k]."""
    weight = _dense(w, k, g.dtype)
    if g.dtype == torch.float16:
        return (g.float() @ weight.float()).to(g.dtype)
    return g @ weight


def _wide(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def _dense(w: Packed, k: int, dtype: torch.dtype) -> Tensor:
    scales = w.absmax
    if w.double:
        scales = double_dequantize.run(scales, w.nested, w.offset.reshape(()))
    flat: Tensor = nf4_dequantize.run(w.codes, scales, w.block, w.rows * k, dtype, w.table)
    return flat.view(w.rows, k)
