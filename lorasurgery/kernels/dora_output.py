"""DoRA's output: y = (m / norm) ∘ (x Wᵀ + x (B A)ᵀ), the bias not among them.

Liu et al. 2024 (DoRA), arXiv 2402.09353, §4.3, eq. 11: the norm counts as a constant, so that
∂y/∂(x Wᵀ) = m / norm and ∂L/∂m = Σ ∂L/∂y ∘ (x Wᵀ + x (B A)ᵀ) / norm over the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import FLOATS, Data, dispatch, dtype_name

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(base: Data, lora: Data, magnitude: Data, norm: Data) -> Data:
    """y [n, out] in the dtype of `base`, rounded once; raises ShapeError. `train` is differentiable.

    Args:
        base: bfloat16, float16 or float32 [n, out], x Wᵀ.
        lora: the same of x (B A)ᵀ.
        magnitude: float32 [out].
        norm: float32 [out], what `dora_norm` gives.

    """
    kinds = [dtype_name(data.dtype) for data in (base, lora, magnitude, norm)]
    if base.ndim != 2 or tuple(lora.shape) != tuple(base.shape) or kinds[0] != kinds[1]:
        raise ShapeError(
            f"dora_output: the base's output is {kinds[0]} {list(base.shape)} and the adapter's "
            f"{kinds[1]} {list(lora.shape)}, but both must be one [n, out]. Reshape or convert them."
        )
    out = (base.shape[1],)
    if (tuple(magnitude.shape), tuple(norm.shape)) != (out, out) or kinds[2:] != ["float32"] * 2:
        raise ShapeError(
            f"dora_output: magnitudes are {kinds[2]} {list(magnitude.shape)} and norms {kinds[3]} "
            f"{list(norm.shape)}, but float32 {list(out)} is needed. Is the adapter for this layer?"
        )
    if kinds[0] not in FLOATS:
        raise ShapeError(
            f"dora_output: {kinds[0]} is not one of {', '.join(FLOATS)}. Convert the outputs first."
        )
    result: Data = dispatch(cpu, launch, base, lora, magnitude, norm)
    return result


def reference(base: Tensor, lora: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """The formula above in plain torch, which also differentiates it."""
    return ((base.float() + lora.float()) * (magnitude / norm.detach())).to(base.dtype)


def train(base: Tensor, lora: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """`run` with gradients for the first three."""
    y: Tensor = _function().apply(base, lora, magnitude, norm)
    return y


def cpu(base: Array, lora: Array, magnitude: Array, norm: Array) -> Array:
    """The same in numba."""
    from lorasurgery.kernels._dora_cpu import scaled
    from lorasurgery.kernels._floats import source, target

    out = np.empty(base.shape, base.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = magnitude / norm
    scaled(source(base), source(lora), source(scale), target(out))
    return out


def launch(base: Tensor, lora: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """The same in Triton."""
    import torch

    from lorasurgery.kernels._dora_triton import scaled

    # it is written flat, and may not inherit the strides of a transposed base
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    bfloat = base.dtype == torch.bfloat16
    if n := base.numel():
        scaled[(-(-n // 1024),)](
            base.contiguous(), lora.contiguous(), magnitude / norm,
            out.view(torch.int16) if bfloat else out, n, base.shape[1], BFLOAT=bfloat, SIZE=1024,
        )  # fmt: skip
    return out


@cache
def _function() -> Any:
    """The autograd function; made when asked for, since torch must not be imported before."""
    import torch

    class Scaled(torch.autograd.Function):
        """The gradient is scaled by the same kernel, with nothing added."""

        @staticmethod
        def forward(ctx: Any, *args: Tensor) -> Tensor:
            ctx.save_for_backward(*args)
            return run(*args)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            base, lora, magnitude, norm = ctx.saved_tensors
            grad_y = grad_m = None
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
                grad_y = run(grad, torch.zeros_like(grad), magnitude, norm)
            if ctx.needs_input_grad[2]:
                grad_m = (grad.float() * (base.float() + lora.float())).sum(dim=0) / norm
            return grad_y, grad_y, grad_m, None

    return Scaled


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype; one row, none, a transposed base, sizes about a program's."""
    import torch

    for n, out in ((1, 1), (3, 257), (5, 1024), (0, 7), (7, 0)):
        base, lora = torch.randn(2, n, out, generator=rng)
        magnitude, norm = torch.rand(2, out, generator=rng) + 0.1
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            yield f"{n}x{out}-{kind}", (base.to(kind), lora.to(kind), magnitude, norm)
    base = torch.randn(9, 4, generator=rng).T
    yield "transposed", (base, torch.ones(4, 9), torch.ones(9), torch.zeros(9))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """As many tokens as features, in bfloat16, for a clock."""
    import torch

    base, lora = torch.randn(2, side, side, generator=rng).to(torch.bfloat16)
    return base, lora, *torch.rand(2, side, generator=rng)
