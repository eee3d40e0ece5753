"""A linear layer over an NF4 weight: y = x · dequant(W)ᵀ + bias, and its gradient for x.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, eq. 5. Weights are rounded to x's dtype, as if they
had been dequantized before; sums are float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.kernels import _packed, double_quantize, nf4_quantize
from lorasurgery.kernels._packed import Packed
from lorasurgery.kernels._tensors import Data, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    x: Data, codes: Data, absmax: Data, block: int, rows: int, table: Data,
    bias: Data | None = None, nested: Data | None = None, offset: Data | None = None,
) -> Data:  # fmt: skip
    """y [m, rows] in x's dtype, differentiable for x and bias; raises ShapeError.

    Args:
        x: bfloat16, float16 or float32 [m, in].
        codes: uint8 [ceil(rows · in / 2)].
        absmax: float32 [ceil(rows · in / block)], or uint8 if they are nested.
        block: weights that share one scale; a power of two from 2 to 4096.
        rows: how many outputs the weight has.
        table: float32 [16], what the codes stand for.
        bias: of x's dtype [rows].
        nested: float32, the scale of every 256 scales; their codes are those of double_quantize.
        offset: float32, a scalar or [1], what was taken off the scales.

    """
    args = codes, absmax, block, rows, table
    _packed.check(x, Packed(*args, nested, offset), bias, "nf4_linear")
    form: Any = cpu
    if is_tensor(x):
        from lorasurgery.kernels._ops import nf4_linear as form
    y: Data = form(x, *args, bias, nested, offset)
    return y


def reference(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor,
    bias: Tensor | None = None, nested: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula above in plain torch; float64 in, float64 out."""
    w = _packed.dense(
        Packed(codes, absmax, block, rows, table, nested, offset), x.shape[1], x.dtype
    )
    y = wide(x) @ wide(w).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    import torch

    return x.to(torch.promote_types(x.dtype, torch.float32))


def cpu(
    x: Array, codes: Array, absmax: Array, block: int, rows: int, table: Array,
    bias: Array | None = None, nested: Array | None = None, offset: Array | None = None,
) -> Array:  # fmt: skip
    """Few rows by numba's matvec; for many, the weight dequantized by numba and multiplied by numpy."""
    y = _packed.product(x, Packed(codes, absmax, block, rows, table, nested, offset))
    return (y if bias is None else y + bias.astype(np.float32)).astype(x.dtype)


def launch(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor,
    bias: Tensor | None = None, nested: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in Triton: row by row for few, in tiles of tensor cores for many."""
    from lorasurgery.kernels._nf4_linear_launch import forward

    return forward(x, Packed(codes, absmax, block, rows, table, nested, offset), bias, None)


def gradient(g: Tensor, k: int, w: Packed) -> Tensor:
    """The gradient for x [m, k]: g · dequant(W), the weight unpacked anew and never kept."""
    if g.is_cuda:
        from lorasurgery.kernels._nf4_linear_launch import backward

        return backward(g, k, w, None)
    from lorasurgery.kernels import _nf4_linear_host as host

    return host.backward(g, k, w)


def tolerance(x: Tensor, *args: Any) -> Tensor:
    """How far a sum in another order, rounded once, may lie from `reference` [m, rows]."""
    import torch

    codes, absmax, block, rows, table, _, nested, offset = (*args, *(None,) * 3)[:8]
    w = Packed(codes, absmax, block, rows, table, nested, offset)
    terms = x.double().abs() @ _packed.dense(w, x.shape[1], torch.float64).abs().T
    return terms * 1e-5 + reference(x, *args).double().abs() * torch.finfo(x.dtype).eps


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """One row and many; no multiples of tiles; blocks across rows' ends; strided; both scales."""
    import torch

    table = torch.from_numpy(NF4.copy())
    sizes = ((1, 64, 96, 64), (3, 70, 320, 32), (17, 33, 63, 64), (70, 130, 128, 4096),
             (2, 5, 4096, 1024), (1, 3, 7, 2), (5, 40, 576, 128), (0, 8, 64, 64))  # fmt: skip
    for m, n, k, block in sizes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = 0.02 * torch.randn(n * k, generator=rng)
            codes, absmax = nf4_quantize.reference(w, block)
            x = torch.randn(m, k + 3, generator=rng).to(dtype)[:, :k]
            bias = torch.randn(n, generator=rng).to(dtype)
            call = f"{m}x{n}x{k}-{block}-{dtype}"
            yield call, (x, codes, absmax, block, n, table)
            # the other scales by turns
            if (dtype == torch.float32) == (m % 2 == 0):
                continue
            q, nested, offset = double_quantize.reference(absmax)
            yield f"{call}-nested", (x, codes, q, block, n, table, bias, nested, offset)
