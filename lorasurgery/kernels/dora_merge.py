"""W' = round(m / ‖V‖ · V) with V = W + B A row by row, and what became of the change D = m / ‖V‖ · V - W.

Liu et al. 2024 (DoRA), arXiv 2402.09353, §4.1. A row of V that is all zero stays zero. The three sums are
lora_merge's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta, lora_merge
from lorasurgery.kernels._chance import keys, rounded, uniform
from lorasurgery.kernels._tensors import Data, Dtype, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

LANES = 64  # running sums of a row's squares, in float64: column j adds to sum j % LANES


def run(
    w: Data, a: Data, b: Data, m: Data, dtype: Dtype, seed: int | None = None, offset: int = 0
) -> tuple[Data, float, float, float]:
    """W' in `dtype`, signal, power and noise2; raises ShapeError.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        a: float32 [r, cols].
        b: float32 [rows, r].
        m: float32 [rows].
        dtype: of the result, one of the same three.
        seed: None rounds to the nearest, a number rounds up or down by chance.
        offset: index of w's first element in its tensor.

    """
    lora_delta.check(a, b, "dora_merge")
    wanted = (b.shape[0], a.shape[1])
    if tuple(w.shape) != wanted or tuple(m.shape) != wanted[:1]:
        raise ShapeError(
            f"dora_merge: W is {list(w.shape)} and m {list(m.shape)}, but B A is {list(wanted)}. Is "
            "this adapter for another base model?"
        )
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._merge_ops import dora_merge as form
    result: tuple[Data, float, float, float] = form(w, a, b, m, dtype, seed, offset)
    return result


def reference(
    w: Tensor, a: Tensor, b: Tensor, m: Tensor, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, float, float, float]:
    """The formulas above; squares and sums in float64."""
    wide = w.float().contiguous()
    v = wide + lora_delta.reference(a, b)
    norm = v.double().square().sum(1).sqrt().float()
    total = (m / (norm + (norm == 0)))[:, None] * v
    if seed is None:
        merged = total.to(dtype)
    else:
        merged = rounded(total, dtype, uniform(seed, offset, total))
    d, change = total - wide, merged.float() - wide
    terms = change.double() * d, d.double().square(), (change - d).double().square()
    signal, power, noise2 = (float(term.sum()) for term in terms)
    return merged, signal, power, noise2


def cpu(
    w: Array, a: Array, b: Array, m: Array, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Array, float, float, float]:
    """The same in numba; the sums are good to about 1e-6 of their terms."""
    from lorasurgery.kernels._dora_merge_cpu import merge
    from lorasurgery.kernels._floats import source, target

    out = np.empty(w.shape, dtype)
    chance = None if seed is None else (*keys(seed), np.uint64(offset))
    factors = source(a), source(b)
    signal, power, noise2 = merge(source(w), factors, source(m), target(out), chance)
    return out, signal, power, noise2


def launch(
    w: Tensor, a: Tensor, b: Tensor, m: Tensor, dtype: Any, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, float, float, float]:
    """The same in Triton: the gain of each row, and then W', a tile a program."""
    from lorasurgery.kernels import _merge_launch as how

    w, a, b = w.contiguous(), a.contiguous(), b.contiguous()
    gain = how.gains(w, a, b, m.contiguous())
    return how.merge(w, (a, b), gain, dtype, (seed, offset))


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype to each, bands and chunks that end early, both roundings, a zero row."""
    import torch

    kinds = torch.bfloat16, torch.float16, torch.float32
    pairs = [(kind, kind) for kind in kinds] + [(kind, torch.float32) for kind in kinds[:2]]
    pairs += [(torch.float32, kind) for kind in kinds[:2]]
    sizes = ((5, 7, 3), (33, 257, 8), (70, 600, 17), (4, 3, 0), (0, 5, 2), (1, 1, 1))
    for rows, columns, rank in sizes:
        w = 0.02 * torch.randn(rows, columns, generator=rng)
        a = 0.1 * torch.randn(rank, columns, generator=rng)
        b = 0.01 * torch.randn(rows, rank, generator=rng)
        m = 0.02 * columns**0.5 * (1 + 0.1 * torch.randn(rows, generator=rng))
        w[rows // 2 :][:1], b[rows // 2 :][:1] = 0, 0
        for kind, into in pairs:
            yield f"{rows}x{columns}-rank{rank}-{kind}-{into}", (w.to(kind), a, b, m, into)
        for kind in kinds:
            yield f"{rows}x{columns}-rank{rank}-{kind}-seed", (w.to(kind), a, b, m, kind, 7, 12345)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, for a clock."""
    import torch

    w, a, b, dtype = lora_merge.sized(rng, side)
    return w, a, b, 0.02 * side**0.5 * (1 + 0.1 * torch.randn(side, generator=rng)), dtype
