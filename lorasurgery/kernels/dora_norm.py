"""DoRA's norms of rows or columns: norm[i] = ‖W[i] + (B A)[i]‖, without W + B A in memory.

Liu et al. 2024 (DoRA), arXiv 2402.09353, §4.1, eq. 5. The expansion ‖W‖² + 2⟨W, BA⟩ + ‖BA‖² has as many
products, and cancels where W and B A do; here a tile of the sum is made in the cache, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

_LEAST = 1 << 20  # multiplications that are worth a thread of their own
_TILE = 1 << 22  # weights that are wide at once while gradients are summed


def run(w: Data, a: Data, b: Data, axis: int = 1) -> Data:
    """float32 [rows], or [cols] along axis 0; differentiable for a and b; raises ShapeError.

    DoRA's paper and PEFT take the norm as a constant (detach it); LyCORIS differentiates it.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        a: float32 [r, cols].
        b: float32 [rows, r], with the adapter's scale in it.
        axis: the one that is summed over.

    """
    lora_delta.check(a, b, "dora_norm")
    if tuple(w.shape) != (b.shape[0], a.shape[1]):
        raise ShapeError(
            f"dora_norm: W is {list(w.shape)}, but B A is {[b.shape[0], a.shape[1]]}. "
            "Is this adapter for another base model?"
        )
    if dtype_name(w.dtype) not in FLOATS:
        raise ShapeError(
            f"dora_norm: {dtype_name(w.dtype)} is not one of {', '.join(FLOATS)}. "
            "Convert the weight first."
        )
    if axis not in (0, 1):
        raise ShapeError(f"dora_norm: axis {axis} is neither 0 nor 1. Norms of rows are along 1.")
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._dora_ops import dora_norm as form
    norm: Data = form(w, a, b, axis)
    return norm


def reference(w: Tensor, a: Tensor, b: Tensor, axis: int = 1) -> Tensor:
    """The sum in float32, as a merge makes it; squares and their sums in float64."""
    import torch

    wide = torch.promote_types(w.dtype, torch.float32)
    merged = w.to(wide) + lora_delta.reference(a, b)
    return merged.double().square().sum(dim=axis).sqrt().to(wide)


def cpu(w: Array, a: Array, b: Array, axis: int = 1) -> Array:
    """The same in numba, rows or columns over threads."""
    from lorasurgery.kernels._dora_cpu import column_norms, row_norms
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._threads import over_rows

    out = np.empty(w.shape[1 - axis], np.float32)
    wide, left, right = source(w), source(a), source(b)

    def part(start: int, stop: int) -> None:
        if axis == 1:
            row_norms(wide[start:stop], left, right[start:stop], out[start:stop])
        else:
            column_norms(wide, left, right, start, stop, out)

    over_rows(part, len(out), -(-_LEAST // max(1, w.shape[axis] * (len(a) + 4))))
    return out


def launch(w: Tensor, a: Tensor, b: Tensor, axis: int = 1) -> Tensor:
    """The same in Triton."""
    from lorasurgery.kernels import _dora_launch as how

    w, a, b = w.contiguous(), a.contiguous(), b.contiguous()
    return how.row_norms(w, a, b) if axis == 1 else how.column_norms(w, a, b)


def gradients(
    g: Tensor, w: Tensor, a: Tensor, b: Tensor, norm: Tensor, axis: int
) -> tuple[Tensor, Tensor]:
    """Those for a and b: Bᵀ G and G Aᵀ, where G = g / norm · (W + B A); some rows of W wide at a time.

    A norm of zero has the gradient zero.
    """
    import torch

    scale = torch.where(norm > 0, g / norm, 0.0)
    ga, gb = torch.zeros_like(a), torch.empty_like(b)
    step = max(1, _TILE // max(1, w.shape[1]))
    for start in range(0, len(w), step):
        here = slice(start, start + step)
        tile = torch.addmm(w[here].float(), b[here], a)
        tile *= scale[here, None] if axis == 1 else scale
        ga.addmm_(b[here].T, tile)
        gb[here] = tile @ a.T
    return ga, gb


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype; ranks about the unrolling, columns about the chunk; a change that all but cancels."""
    import torch

    sizes = (
        (5, 7, 1), (3, 255, 7), (9, 256, 8), (33, 257, 13), (17, 600, 64), (4, 3, 0),
        (0, 5, 2), (1, 1, 1), (3, 0, 2),
    )  # fmt: skip
    for rows, columns, rank in sizes:
        a, b = (torch.randn(s, generator=rng) for s in ((rank, columns), (rows, rank)))
        w = torch.randn(rows, columns, generator=rng)
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            call = w.to(kind), a, 0.1 * b
            yield f"{rows}x{columns}-rank{rank}-{kind}", call
            yield f"{rows}x{columns}-rank{rank}-{kind}-columns", (*call, 0)
    a, b = torch.randn(1, 300, generator=rng), torch.randn(6, 1, generator=rng)
    huge = torch.full((2, 70), 1e38), torch.ones(1, 70), torch.ones(2, 1)
    for axis in (0, 1):
        yield f"cancels-{axis}", (-(b @ a) * (1 + 1e-5), a, b, axis)
        yield f"huge-{axis}", (*huge, axis)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, for a clock."""
    import torch

    w = 0.02 * torch.randn(side, side, generator=rng)
    return w.to(torch.bfloat16), *lora_delta.sized(rng, side)
