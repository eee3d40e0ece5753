"""NF4 products of CPU tensors: weights unpacked by numba, and multiplied by torch.

numpy's threads wait in a loop for more, on the processors that torch's need for what comes next: a
training step whose products alternate between the two took twice as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lorasurgery.arrays import Array
from lorasurgery.kernels._packed import Packed, decoded
from lorasurgery.kernels._tensors import dispatch


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
    parts = w.codes, w.absmax, w.block, w.rows, w.table, w.nested, w.offset
    weight: Tensor = dispatch(_decoded, _decoded, *parts, k, dtype)
    return weight


def _decoded(*args: Any) -> Array:
    *parts, k, dtype = args
    return decoded(Packed(*parts), k, dtype)
