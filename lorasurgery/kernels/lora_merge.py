"""W' = round(W + B A), rounded once from float32, with what became of the intended change D = B A.

Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. With C = W' - W: signal = Σ C·D, power = Σ D²,
noise2 = Σ (C - D)²; signal / power is the share of the change that rounding kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta
from lorasurgery.kernels._chance import keys, rounded, uniform
from lorasurgery.kernels._tensors import FLOATS, Data, Dtype, dispatch, dtype_name

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    w: Data, a: Data, b: Data, dtype: Dtype, seed: int | None = None, offset: int = 0
) -> tuple[Data, float, float, float]:
    """W + B A in `dtype`, signal, power and noise2; raises ShapeError.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        a: float32 [r, cols].
        b: float32 [rows, r].
        dtype: of the result, one of the same three; what does not fit in it becomes inf.
        seed: None rounds to the nearest, a number rounds up or down by chance.
        offset: index of w's first element in its tensor, so that chance is free of tiling.

    """
    lora_delta.check(a, b, "lora_merge")
    if tuple(w.shape) != (b.shape[0], a.shape[1]):
        raise ShapeError(
            f"lora_merge: W is {list(w.shape)}, but B A is {[b.shape[0], a.shape[1]]}. "
            "Is this adapter for another base model?"
        )
    for kind in (dtype_name(w.dtype), dtype_name(dtype)):
        if kind not in FLOATS:
            raise ShapeError(
                f"lora_merge: {kind} is not one of {', '.join(FLOATS)}. Convert the weight first."
            )
    result: tuple[Data, float, float, float] = dispatch(
        cpu, reference, w, a, b, dtype, seed, offset
    )
    return result


def reference(
    w: Tensor, a: Tensor, b: Tensor, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, float, float, float]:
    """The formulas above; sums in float64."""
    wide, d = w.float(), lora_delta.reference(a, b)
    total = wide + d
    if seed is None:
        merged = total.to(dtype)
    else:
        merged = rounded(total, dtype, uniform(seed, offset, total))
    change, d = merged.double() - wide.double(), d.double()
    sums = (change * d).sum(), (d * d).sum(), (change - d).square().sum()
    return merged, float(sums[0]), float(sums[1]), float(sums[2])


def cpu(
    w: Array, a: Array, b: Array, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Array, float, float, float]:
    """The same in numba, in one pass; the sums are good to about 1e-6 of their terms."""
    from lorasurgery.kernels._floats import carrier
    from lorasurgery.kernels._lora_cpu import merge

    out = np.empty(w.shape, dtype)
    chance = None if seed is None else (*keys(seed), np.uint64(offset))
    a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
    signal, power, noise2 = merge(carrier(w), a, b, carrier(out), chance)
    return out, signal, power, noise2


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype to each, rank 0 and ranks about the unrolling, both roundings, overflow."""
    import torch

    kinds = torch.bfloat16, torch.float16, torch.float32
    sizes = ((5, 7, 3), (33, 257, 8), (70, 600, 17), (4, 3, 0), (0, 5, 2), (1, 1, 1))
    for rows, columns, rank in sizes:
        w = 0.02 * torch.randn(rows, columns, generator=rng)
        a = 0.1 * torch.randn(rank, columns, generator=rng)
        b = 0.01 * torch.randn(rows, rank, generator=rng)
        for source in kinds:
            for target in kinds:
                label = f"{rows}x{columns}-rank{rank}-{source}-{target}"
                yield label, (w.to(source), a, b, target)
                yield f"{label}-seed", (w.to(source), a, b, target, 7, 12345)
    huge, one = torch.full((2, 3), 60000.0), torch.ones(1, 3)
    for target in kinds:
        yield f"overflow-{target}", (huge, one, torch.tensor([[1e4], [-2e5]]), target)
    # the smallest steps of float16, and an index beyond 2^32
    tiny = torch.full((40, 50), 3e-8)
    zero = torch.zeros(1, 50), torch.zeros(40, 1)
    yield "tiny-seed", (tiny, *zero, torch.float16, -5, (1 << 32) - 77)
