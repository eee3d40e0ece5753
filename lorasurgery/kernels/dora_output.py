"""DoRA's output: y = (m / norm) ∘ (x Wᵀ + x (B A)ᵀ), the bias not among them.

Liu et al. 2024 (DoRA), arXiv 2402.09353, §4.3, eq. 11. Where the norms are those of columns, the inputs are
scaled instead: x ∘ (m / norm), which is this without an adapter's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import FLOATS, Data, dispatch, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(base: Data, lora: Data | None, magnitude: Data, norm: Data) -> Data:
    """y [n, out] in the dtype of `base`, rounded once; differentiable for all four; raises ShapeError.

    Args:
        base: bfloat16, float16 or float32 [n, out], x Wᵀ.
        lora: the same of x (B A)ᵀ; None stands for zeros.
        magnitude: float32 [out].
        norm: float32 [out], what `dora_norm` gives.

    """
    _check(base, lora, magnitude, norm)
    form: Any = cpu
    if is_tensor(base):
        from lorasurgery.kernels._dora_ops import dora_output as form
    y: Data = form(base, lora, magnitude, norm)
    return y


def _check(base: Any, lora: Any, magnitude: Any, norm: Any) -> None:
    other = base if lora is None else lora
    kinds = [dtype_name(data.dtype) for data in (base, other, magnitude, norm)]
    if base.ndim != 2 or tuple(other.shape) != tuple(base.shape) or kinds[0] != kinds[1]:
        raise ShapeError(
            f"dora_output: the base's output is {kinds[0]} {list(base.shape)} and the adapter's "
            f"{kinds[1]} {list(other.shape)}, but both must be one [n, out]. Reshape or convert them."
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


def reference(base: Tensor, lora: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    """The formula above in plain torch, which also differentiates it."""
    from lorasurgery.kernels.nf4_linear import wide

    total = wide(base) if lora is None else wide(base) + wide(lora)
    return (total * (magnitude / norm)).to(base.dtype)


def train(base: Tensor, lora: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    """`run` with the norm as a constant, as §4.3 of the paper has it."""
    return run(base, lora, magnitude, norm.detach())


def cpu(base: Array, lora: Array | None, magnitude: Array, norm: Array) -> Array:
    """The same in numba."""
    from lorasurgery.kernels._dora_cpu import scaled
    from lorasurgery.kernels._floats import source, target

    out = np.empty(base.shape, base.dtype)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = magnitude / norm
    scaled(source(base), None if lora is None else source(lora), source(scale), target(out))
    return out


def launch(base: Tensor, lora: Tensor | None, magnitude: Tensor, norm: Tensor) -> Tensor:
    """The same in Triton."""
    from lorasurgery.kernels._dora_launch import scaled

    lora = None if lora is None else lora.contiguous()
    return scaled(base.contiguous(), lora, magnitude / norm)


def gradients(
    g: Tensor, base: Tensor, lora: Tensor | None, magnitude: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those for base and lora alike, for m and for the norm: one pass over g and the outputs."""
    scale = magnitude / norm
    gy, sums = dispatch(_backward_cpu, _backward_launch, g, base, lora, scale)
    gm = sums / norm
    return gy, gm, -gm * scale


def _backward_cpu(g: Array, base: Array, lora: Array | None, scale: Array) -> tuple[Array, Array]:
    from lorasurgery.kernels._dora_cpu import scaled_backward
    from lorasurgery.kernels._floats import source, target

    out, sums = np.empty(base.shape, base.dtype), np.zeros(len(scale))
    other = None if lora is None else source(lora)
    scaled_backward(source(g), source(base), other, source(scale), target(out), sums)
    return out, sums.astype(np.float32)


def _backward_launch(
    g: Tensor, base: Tensor, lora: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    from lorasurgery.kernels._dora_launch import scaled_backward

    lora = None if lora is None else lora.contiguous()
    return scaled_backward(g.contiguous(), base.contiguous(), lora, scale)


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype; one row, none, a transposed base, sizes about a program's."""
    import torch

    for n, out in ((1, 1), (3, 257), (5, 1024), (0, 7), (7, 0)):
        base, lora = torch.randn(2, n, out, generator=rng)
        magnitude, norm = torch.rand(2, out, generator=rng) + 0.1
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            yield f"{n}x{out}-{kind}", (base.to(kind), lora.to(kind), magnitude, norm)
            yield f"{n}x{out}-{kind}-alone", (base.to(kind), None, magnitude, norm)
    base = torch.randn(9, 4, generator=rng).T
    yield "transposed", (base, torch.ones(4, 9), torch.ones(9), torch.zeros(9))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """As many tokens as features, in bfloat16, for a clock."""
    import torch

    base, lora = torch.randn(2, side, side, generator=rng).to(torch.bfloat16)
    return base, lora, *torch.rand(2, side, generator=rng)
