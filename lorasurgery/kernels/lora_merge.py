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
from lorasurgery.kernels._tensors import FLOATS, Data, Dtype, dtype_name, is_tensor

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
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._merge_ops import lora_merge as form
    result: tuple[Data, float, float, float] = form(w, a, b, dtype, seed, offset)
    return result


def reference(
    w: Tensor, a: Tensor, b: Tensor, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, float, float, float]:
    """The formulas above; differences in float32, sums in float64."""
    wide, d = w.float(), lora_delta.reference(a, b)
    total = wide + d
    if seed is None:
        merged = total.to(dtype)
    else:
        merged = rounded(total, dtype, uniform(seed, offset, total))
    change = merged.float() - wide
    terms = change.double() * d, d.double().square(), (change - d).double().square()
    signal, power, noise2 = (float(term.sum()) for term in terms)
    return merged, signal, power, noise2


def cpu(
    w: Array, a: Array, b: Array, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Array, float, float, float]:
    """The same in numba, in one pass; the sums are good to about 1e-6 of their terms."""
    from lorasurgery.kernels._floats import source, target
    from lorasurgery.kernels._lora_cpu import merge

    out = np.empty(w.shape, dtype)
    chance = None if seed is None else (*keys(seed), np.uint64(offset))
    signal, power, noise2 = merge(source(w), source(a), source(b), target(out), chance)
    return out, signal, power, noise2


def launch(
    w: Tensor, a: Tensor, b: Tensor, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, float, float, float]:
    """The same in Triton, a tile a program; its sums meet in float64."""
    from lorasurgery.kernels import _merge_launch as how

    factors = a.contiguous(), b.contiguous()
    return how.merge(w.contiguous(), factors, None, dtype, (seed, offset))


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype to each, rank 0 and ranks about the unrolling, both roundings, overflow."""
    import torch

    kinds = torch.bfloat16, torch.float16, torch.float32
    pairs = [(kind, kind) for kind in kinds] + [(kind, torch.float32) for kind in kinds[:2]]
    pairs += [(torch.float32, kind) for kind in kinds[:2]]
    sizes = ((5, 7, 3), (33, 257, 8), (70, 600, 17), (4, 3, 0), (0, 5, 2), (1, 1, 1))
    for rows, columns, rank in sizes:
        w = 0.02 * torch.randn(rows, columns, generator=rng)
        a = 0.1 * torch.randn(rank, columns, generator=rng)
        b = 0.01 * torch.randn(rows, rank, generator=rng)
        for kind, into in pairs:
            yield f"{rows}x{columns}-rank{rank}-{kind}-{into}", (w.to(kind), a, b, into)
        for kind in kinds:
            yield f"{rows}x{columns}-rank{rank}-{kind}-seed", (w.to(kind), a, b, kind, 7, 12345)
    huge, one = torch.full((2, 3), 60000.0), torch.ones(1, 3)
    for into in kinds:
        yield f"overflow-{into}", (huge, one, torch.tensor([[1e4], [-2e5]]), into)
    # the smallest steps of float16, and an index beyond 2^32
    tiny = torch.full((40, 50), 3e-6)
    zero = torch.full((1, 50), 1e-8), torch.ones(40, 1)
    yield "tiny-seed", (tiny.half(), *zero, torch.float16, -5, (1 << 32) - 77)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, for a clock."""
    import torch

    w = 0.02 * torch.randn(side, side, generator=rng)
    return w.to(torch.bfloat16), *lora_delta.sized(rng, side), torch.bfloat16
