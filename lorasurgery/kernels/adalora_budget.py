"""AdaLoRA's budget: of all triplets, those whose score lies above the (n - budget)-th smallest keep their E.

Zhang et al. 2023, arXiv 2303.10512, §3.3, eq. 6, with the score of §3.2, s(E_i) + mean_j s(B_ji) + mean_j s(A_ij): the sum,
the threshold and the mask in one pass that waits for nobody. Ties at the threshold go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(e: Data, of_e: Data, of_a: Data, of_b: Data, budget: int) -> tuple[Data, Data]:
    """E with zeros for the triplets that go, float32 [n]; and which of them stay, bool [n]; raises ShapeError.

    Args:
        e: float32 [n], E of all layers in one array.
        of_e: float32 [n], its scores.
        of_a: float32 [n], what `adalora_importance` gives for A.
        of_b: float32 [n], and for B.
        budget: how many may stay; with ties at the threshold fewer do.

    """
    arrays = e, of_e, of_a, of_b
    shapes, kinds = [list(x.shape) for x in arrays], {dtype_name(x.dtype) for x in arrays}
    if e.ndim != 1 or shapes != [shapes[0]] * 4 or kinds != {"float32"} or budget < 0:
        raise ShapeError(
            f"adalora_budget: E and scores are {shapes} of {', '.join(sorted(kinds))} with a budget "
            f"of {budget}, but four flat float32 of one size and at least 0 are needed. Convert them."
        )
    form: Any = cpu
    if is_tensor(e):
        from lorasurgery.kernels._training_ops import adalora_budget as form
    result: tuple[Data, Data] = form(*arrays, budget)
    return result


def reference(
    e: Tensor, of_e: Tensor, of_a: Tensor, of_b: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch."""
    scores = of_e + of_b + of_a
    pruned = len(scores) - budget
    keep = ~scores.isnan()
    if pruned > 0:
        keep = scores > scores.kthvalue(pruned).values
    return e.where(keep, 0.0), keep


def cpu(e: Array, of_e: Array, of_a: Array, of_b: Array, budget: int) -> tuple[Array, Array]:
    """The same by numpy: thousands of triplets are no work."""
    scores = of_e + of_b + of_a
    pruned = len(scores) - budget
    keep = ~np.isnan(scores)
    if pruned > 0:
        keep = scores > np.partition(scores, pruned - 1)[pruned - 1]
    return np.where(keep, e, np.float32(0)), keep


def launch(
    e: Tensor, of_e: Tensor, of_a: Tensor, of_b: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """The same in Triton: one program, which finds the threshold bit by bit."""
    import torch

    from lorasurgery.kernels._training_triton import BUDGET, choose
    from lorasurgery.kernels._tuning import Config, tuned

    inputs = [x.contiguous() for x in (e, of_e, of_a, of_b)]
    out, keep = torch.empty_like(inputs[0]), torch.empty(len(e), dtype=torch.uint8, device=e.device)
    scores, n = torch.empty_like(inputs[0]), len(e)

    def start(config: Config) -> None:
        choose[(1,)](*inputs, scores, out, keep, n, n - budget, **config)

    if n:
        tuned("budget", BUDGET, (e,), start)
    return out, keep.bool()


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Budgets from none to more than there are; ties, scores below zero, nan, several steps of a program."""
    import torch

    for n in (1, 7, 1024, 5000):
        e, *scores = torch.randn(4, n, generator=rng)
        for budget in sorted({0, 1, n // 3, n - 1, n, n + 5}):
            yield f"{n}-{budget}", (e, *(s.abs() for s in scores), budget)
        yield f"{n}-signed", (e, *scores, n // 2)
    e, *scores = torch.randint(0, 3, (4, 700), generator=rng).float()
    yield "ties", (e, *scores, 300)
    yield "zeros", (e, 0 * e, -0.0 * e, 0 * e, 300)
    holes = scores[0].clone()
    holes[::9] = torch.nan
    yield "nan", (e, holes, *scores[1:], 650)
    yield "none", (e[:0], *(s[:0] for s in scores), 3)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """As many triplets as a large model's, for a clock."""
    import torch

    return *torch.rand(4, 8 * side, generator=rng), 4 * side
