"""A linear layer over an NF4 weight with LoRA: y = x · dequant(W)ᵀ + h · Bᵀ + bias, h = s · (x · Aᵀ).

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, eq. 5. W and h are rounded to x's dtype, sums are
float32, rounded once; for many rows on a CPU, x · dequant(W)ᵀ is rounded before h · Bᵀ is added. W is read
once, and unpacked anew for the gradient; where A is frozen, all that is kept of x is h.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import _packed, double_quantize, nf4_quantize
from lorasurgery.kernels._packed import Packed
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4
from lorasurgery.kernels.nf4_linear import wide

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    x: Data, codes: Data, absmax: Data, block: int, rows: int, table: Data, a: Data, b: Data,
    scale: float, bias: Data | None = None, nested: Data | None = None, offset: Data | None = None,
) -> Data:  # fmt: skip
    """y [m, rows] in x's dtype, differentiable for x, a, b and bias; raises ShapeError.

    Args:
        x: bfloat16, float16 or float32 [m, in].
        codes: uint8 [ceil(rows · in / 2)].
        absmax: float32 [ceil(rows · in / block)], or uint8 if they are nested.
        block: weights that share one scale; a power of two from 2 to 4096.
        rows: how many outputs the weight has.
        table: float32 [16], what the codes stand for.
        a: bfloat16, float16 or float32 [r, in]; rounded to x's dtype.
        b: the same [rows, r].
        scale: s, by which the low-rank term is multiplied.
        bias: of x's dtype [rows].
        nested: float32, the scale of every 256 scales; their codes are those of double_quantize.
        offset: float32, a scalar or [1], what was taken off the scales.

    """
    _packed.check(x, Packed(codes, absmax, block, rows, table, nested, offset), bias, "lora_linear")
    k, kinds = x.shape[1], {dtype_name(a.dtype), dtype_name(b.dtype)}
    if (*a.shape, *b.shape) != (a.shape[0], k, rows, a.shape[0]) or not kinds <= FLOATS.keys():
        raise ShapeError(
            f"lora_linear: A is {dtype_name(a.dtype)} {list(a.shape)} and B is "
            f"{dtype_name(b.dtype)} {list(b.shape)}, but [r, {k}] and [{rows}, r] of "
            f"{', '.join(FLOATS)} are needed. Transpose or pair them rightly."
        )
    args = codes, absmax, block, rows, table, a, b, scale, bias, nested, offset
    form: Any = cpu
    if is_tensor(x):
        from lorasurgery.kernels._ops import lora_linear_alone as form
    y: Data = form(x, *args)
    return y


def reference(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor, a: Tensor,
    b: Tensor, scale: float, bias: Tensor | None = None, nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula above in plain torch; float64 in, float64 out."""
    w = _packed.dense(
        Packed(codes, absmax, block, rows, table, nested, offset), x.shape[1], x.dtype
    )
    h = (scale * (wide(x) @ wide(a.to(x.dtype)).T)).to(x.dtype)
    y = wide(x) @ wide(w).T + wide(h) @ wide(b.to(x.dtype)).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def cpu(
    x: Array, codes: Array, absmax: Array, block: int, rows: int, table: Array, a: Array,
    b: Array, scale: float, bias: Array | None = None, nested: Array | None = None,
    offset: Array | None = None,
) -> Array:  # fmt: skip
    """The base as `nf4_linear` has it, thin products by numpy."""
    w = Packed(codes, absmax, block, rows, table, nested, offset)
    x32, a32, b32 = (_rounded(t, x.dtype) for t in (x, a, b))
    h = _rounded(np.float32(scale) * (x32 @ a32.T), x.dtype)
    y = _packed.product(x, w) + h @ b32.T
    out: Array = (y if bias is None else y + bias.astype(np.float32)).astype(x.dtype)
    return out


def _rounded(x: Array, dtype: Any) -> Array:
    wider: Array = x.astype(dtype).astype(np.float32)
    return wider


def launch(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor, a: Tensor,
    b: Tensor, scale: float, bias: Tensor | None = None, nested: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in Triton: the low-rank term is added to the sums before they are rounded."""
    from lorasurgery.kernels._nf4_linear_launch import forward

    w = Packed(codes, absmax, block, rows, table, nested, offset)
    low = scaled(scale, x, a.to(x.dtype).T), b.to(x.dtype).contiguous()
    return forward(x, w, bias, low)


def gradients(
    g: Tensor, kept: tuple[Tensor | None, Tensor], w: Packed, a: Tensor, b: Tensor, scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those for x, a and b: g W + u A, uᵀ x and gᵀ h, with u = s · g B; empty where not wanted.

    `kept` are x, which the one for a needs, and h.
    """
    x, h = kept
    u = scaled(scale, g, b.to(g.dtype)) if any(wanted[:2]) else g
    return (
        _for_x(g, u, w, a.to(g.dtype)) if wanted[0] else g.new_empty(0),
        g.new_empty(0) if x is None or not wanted[1] else (u.T @ x).to(a.dtype),
        # turned: a product with few rows is done sooner than one with few columns
        (h.T @ g).T.to(b.dtype) if wanted[2] else g.new_empty(0),
    )


def _for_x(g: Tensor, u: Tensor, w: Packed, a: Tensor) -> Tensor:
    if g.is_cuda:
        from lorasurgery.kernels._nf4_linear_launch import backward

        return backward(g, a.shape[1], w, (u, a.contiguous()))
    from lorasurgery.kernels import _nf4_linear_host as host

    return host.backward(g, a.shape[1], w).addmm_(u, a)


def scaled(scale: float, x: Tensor, y: Tensor) -> Tensor:
    """Scale · x y, rounded once."""
    import torch

    return torch.addmm(x.new_empty(1), x, y, beta=0, alpha=scale)


def tolerance(x: Tensor, *args: Any) -> Tensor:
    """How far a sum in another order, rounded once, may lie from `reference` [m, rows].

    h may be rounded to either of two neighbours.
    """
    import torch

    codes, absmax, block, rows, table, a, b, scale, bias, nested, offset = (*args, *(None,) * 3)[
        :11
    ]
    w = Packed(codes, absmax, block, rows, table, nested, offset)
    weight = _packed.dense(w, x.shape[1], torch.float64).abs()
    size, eps = x.double().abs(), torch.finfo(x.dtype).eps
    low = abs(scale) * size @ a.double().abs().T @ b.double().abs().T
    plain = size @ weight.T + low + (0 if bias is None else bias.double().abs())
    h = abs(scale) * (x.double() @ a.to(x.dtype).double().T).abs()
    near = h @ b.double().abs().T + reference(x, *args).double().abs()
    limit: Tensor = plain * 1e-5 + near * eps
    return limit


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Odd ranks and large ones, one row and many, factors of another dtype, both scales."""
    import torch

    table = torch.from_numpy(NF4.copy())
    sizes = ((1, 64, 96, 64, 1), (3, 70, 320, 32, 7), (17, 33, 63, 64, 3), (66, 40, 128, 64, 13),
             (2, 5, 1024, 1024, 256), (20, 40, 192, 128, 64), (0, 8, 64, 64, 4), (4, 6, 64, 32, 0))  # fmt: skip
    for m, n, k, block, rank in sizes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = 0.02 * torch.randn(n * k, generator=rng)
            codes, absmax = nf4_quantize.reference(w, block)
            x = torch.randn(m, k + 3, generator=rng).to(dtype)[:, :k]
            a, b = torch.randn(rank, k, generator=rng) / 8, torch.randn(n, rank, generator=rng) / 8
            bias = torch.randn(n, generator=rng).to(dtype)
            call = f"{m}x{n}x{k}-{block}-rank{rank}-{dtype}"
            yield call, (x, codes, absmax, block, n, table, a.to(dtype), b.to(dtype), 2.0)
            # the other scales, and factors of their own dtype, by turns
            if (dtype == torch.float32) == (m % 2 == 0):
                continue
            q, nested, offset = double_quantize.reference(absmax)
            packed = x, codes, q, block, n, table
            yield f"{call}-nested", (*packed, a, b, 0.3, bias, nested, offset)
