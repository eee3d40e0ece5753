"""AdaLoRA's importance: I = |w ∘ g|, Ī' = β1 Ī + (1 - β1) I, Ū' = β2 Ū + (1 - β2) |I - Ī'|, s = Ī' ∘ Ū'.

Zhang et al. 2023, arXiv 2303.10512, §3.2, eq. 8-10. A triplet's score is s(E_i) + mean_j s(B_ji) + mean_j s(A_ij),
each mean from one call; the budget keeps the triplets of highest score.
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

BETA = 0.85


def run(
    w: Data, grad: Data, sensitivity: Data, uncertainty: Data, axis: int,
    beta1: float = BETA, beta2: float = BETA,
) -> tuple[Data, Data, Data]:  # fmt: skip
    """Ī', Ū' and the mean of s over each triplet, float32 [r]; raises ShapeError.

    Args:
        w: float32 [rows, cols]: A [r, in] and E [r, 1] with axis 1, B [out, r] with axis 0.
        grad: float32 [rows, cols].
        sensitivity: float32 [rows, cols], Ī; zeros at first.
        uncertainty: float32 [rows, cols], Ū; zeros at first.
        axis: the one that the mean runs along.
        beta1: how slowly the sensitivity follows.
        beta2: how slowly the uncertainty follows.

    """
    arrays = w, grad, sensitivity, uncertainty
    shapes, kinds = [list(x.shape) for x in arrays], {dtype_name(x.dtype) for x in arrays}
    if w.ndim != 2 or shapes != [shapes[0]] * 4 or kinds != {"float32"} or axis not in (0, 1):
        raise ShapeError(
            f"adalora_importance: factor, gradient and state are {shapes} of "
            f"{', '.join(sorted(kinds))} with axis {axis}, but four float32 [rows, cols] of one "
            "shape and axis 0 or 1 are needed. Convert them."
        )
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._training_ops import adalora_importance as form
    result: tuple[Data, Data, Data] = form(*arrays, axis, beta1, beta2)
    return result


def kept(scores: Any, budget: int) -> Any:
    """Which of all triplets' scores [n] stay: those above the (n - budget)-th smallest; bool [n].

    Ties at the threshold go together, so that fewer than `budget` may stay.
    """
    pruned = len(scores) - budget
    if pruned <= 0:
        return scores > -np.inf
    if is_tensor(scores):
        return scores > scores.kthvalue(pruned).values
    return scores > np.partition(scores, pruned - 1)[pruned - 1]


def reference(
    w: Tensor, grad: Tensor, sensitivity: Tensor, uncertainty: Tensor, axis: int,
    beta1: float = BETA, beta2: float = BETA,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formulas above in plain torch; the mean in float64."""
    now = (w * grad).abs()
    smooth = sensitivity * beta1 + (1 - beta1) * now
    wide = uncertainty * beta2 + (1 - beta2) * (now - smooth).abs()
    return smooth, wide, (smooth * wide).double().mean(dim=axis).float()


def cpu(
    w: Array, grad: Array, sensitivity: Array, uncertainty: Array, axis: int,
    beta1: float = BETA, beta2: float = BETA,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The same in numba, in one pass."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._training_cpu import importance

    sums = np.empty(w.shape[1 - axis], np.float64)
    out = np.empty(w.shape, np.float32), np.empty(w.shape, np.float32), sums
    betas = tuple(_betas(beta1, beta2))
    importance(
        source(w), source(grad), (source(sensitivity), source(uncertainty)), betas, axis, out
    )
    with np.errstate(invalid="ignore"):
        return out[0], out[1], (sums / w.shape[axis]).astype(np.float32)


def _betas(beta1: float, beta2: float) -> Array:
    return np.array([beta1, 1 - beta1, beta2, 1 - beta2], np.float32)


def launch(
    w: Tensor, grad: Tensor, sensitivity: Tensor, uncertainty: Tensor, axis: int,
    beta1: float = BETA, beta2: float = BETA,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in Triton: one pass, and the sum of its few partial sums."""
    import torch

    from lorasurgery.kernels import _training_triton as kernels
    from lorasurgery.kernels._tuning import Config, tuned

    triplets, items = w.shape[1 - axis], w.shape[axis]
    out = w.new_empty(w.shape), w.new_empty(w.shape)
    inputs = [x.contiguous() for x in (w, grad, sensitivity, uncertainty)]
    betas = torch.from_numpy(_betas(beta1, beta2)).to(w.device)
    sums = [torch.zeros(0, triplets, dtype=torch.float64, device=w.device)]

    def start(config: Config) -> None:
        grid = -(-triplets // config["TRIPLETS"]), -(-items // config["ITEMS"])
        sums[0] = torch.empty(grid[1], triplets, dtype=torch.float64, device=w.device)
        kernels.importance[grid](
            *inputs, betas, *out, sums[0], triplets, items, TRIPLETS_FIRST=axis == 1, **config,
            enable_fp_fusion=False,
        )  # fmt: skip

    if w.numel():
        configs = kernels.IMPORTANCE if axis == 1 else kernels.IMPORTANCE_ACROSS
        tuned("importance", configs, (w, axis), start)
    return *out, (sums[0].sum(dim=0) / items).float()


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Both axes, one item, sizes about a program's, other betas; zeros at first."""
    import torch

    for rows, columns in (
        (12, 700),
        (700, 12),
        (3, 1),
        (1, 3),
        (17, 1025),
        (65, 17),
        (5, 0),
        (0, 5),
    ):
        w, grad, old, spread = torch.randn(4, rows, columns, generator=rng)
        for axis in (0, 1):
            yield f"{rows}x{columns}-{axis}", (w, grad, old.abs(), spread.abs(), axis)
        yield f"{rows}x{columns}-first", (w, grad, 0 * old, 0 * spread, 1, 0.5, 0.99)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A hundred layers' A at rank 12, for a clock."""
    import torch

    return *torch.rand(4, 12, 100 * side, generator=rng), 1
