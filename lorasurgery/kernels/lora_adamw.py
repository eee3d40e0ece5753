"""AdamW for LoRA's factors, all in one flat array: A before `split`, and after it B with LoRA+'s rate.

Loshchilov & Hutter 2019, arXiv 1711.05101, alg. 2, as torch.optim.AdamW orders it: w' = w (1 - lr λ) - lr / (1 - β1ᵗ)
· m' / (√v' / √(1 - β2ᵗ) + ε). Hayou et al. 2024 (LoRA+), arXiv 2402.12354, §4: lr of B is `ratio` times A's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

_LEAST = 1 << 17  # elements that are worth a thread of their own


@dataclass(frozen=True, slots=True)
class Rates:
    """Hyperparameters; the defaults are torch.optim.AdamW's, but for the ratio."""

    lr: float
    ratio: float = 16.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01

    @property
    def listed(self) -> list[float]:
        """As an operator of torch takes them."""
        return [self.lr, self.ratio, self.beta1, self.beta2, self.eps, self.weight_decay]

    def numbers(self, step: int) -> Array:
        """float32 [2, 7], for A and for B: computed in Python's floats, rounded once, as torch does."""
        root = math.sqrt(1 - self.beta2**step)
        rows = [
            (
                1 - lr * self.weight_decay, 1 - self.beta1, self.beta2, 1 - self.beta2, root,
                self.eps, lr / (1 - self.beta1**step),
            )
            for lr in (self.lr, self.lr * self.ratio)
        ]  # fmt: skip
        return np.array(rows, np.float32)


def run(
    w: Data, grad: Data, m: Data, v: Data, split: int, step: int, rates: Rates
) -> tuple[Data, Data, Data]:
    """New w, m and v; raises ShapeError. `update` does it in place.

    Args:
        w: float32 [n], the factors.
        grad: float32 [n].
        m: float32 [n], the mean of gradients.
        v: float32 [n], the mean of their squares.
        split: index of the first element that belongs to a B.
        step: 1 at the first step.
        rates: learning rates and the like.

    """
    _check(w, grad, m, v, split, step)
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._training_ops import stepped as form
    new: tuple[Data, Data, Data] = form(w, grad, m, v, split, step, rates)
    return new


def update(w: Data, grad: Data, m: Data, v: Data, split: int, step: int, rates: Rates) -> None:
    """The same, over w, m and v themselves, which must be contiguous; raises ShapeError."""
    _check(w, grad, m, v, split, step)
    form: Any = cpu_inplace
    if is_tensor(w):
        from lorasurgery.kernels._training_ops import step_in_place as form
    form(w, grad, m, v, split, step, rates)


def _check(w: Any, grad: Any, m: Any, v: Any, split: int, step: int) -> None:
    shapes = [list(x.shape) for x in (w, grad, m, v)]
    kinds = {dtype_name(x.dtype) for x in (w, grad, m, v)}
    if w.ndim != 1 or shapes != [shapes[0]] * 4 or kinds != {"float32"}:
        raise ShapeError(
            f"lora_adamw: factors, gradient and moments are {shapes} of "
            f"{', '.join(sorted(kinds))}, but four flat float32 of one size are needed. "
            "Flatten and convert them."
        )
    if not 0 <= split <= shapes[0][0] or step < 1:
        raise ShapeError(
            f"lora_adamw: split {split} is not in 0..{shapes[0][0]}, or step {step} is below 1. "
            "Count the elements of all A, and steps from 1."
        )


def reference(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, split: int, step: int, rates: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above in plain torch, each operation rounded."""
    import torch

    numbers = torch.from_numpy(rates.numbers(step)).to(w.device)
    _, first, second, rest, root, eps, _ = numbers[0]
    of_b = (torch.arange(len(w), device=w.device) >= split).long()
    decay, rate = numbers[of_b, 0], numbers[of_b, 6]
    m = m + first * (grad - m)
    v = v * second + rest * grad * grad
    # by way of float64, since torch's own square root is not always the nearest
    below = v.double().sqrt().float() / root + eps
    return w * decay - rate * m / below, m, v


def cpu(
    w: Array, grad: Array, m: Array, v: Array, split: int, step: int, rates: Rates
) -> tuple[Array, Array, Array]:
    """The same in numba, in one pass."""
    out = np.empty_like(w), np.empty_like(w), np.empty_like(w)
    _cpu(w, grad, m, v, split, step, rates, out=out)
    return out


def cpu_inplace(w: Array, grad: Array, m: Array, v: Array, *more: Any) -> None:
    """`update` in numba."""
    _cpu(w, grad, m, v, *more, out=(w, m, v))


def _cpu(
    w: Array, grad: Array, m: Array, v: Array, split: int, step: int, rates: Rates,
    *, out: tuple[Array, ...],
) -> None:  # fmt: skip
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._threads import over_rows
    from lorasurgery.kernels._training_cpu import adamw

    numbers, inputs = rates.numbers(step), [source(x) for x in (w, grad, m, v)]
    for group, (begin, end) in enumerate(((0, split), (split, len(w)))):

        def part(start: int, stop: int, begin: int = begin, group: int = group) -> None:
            here = slice(begin + start, begin + stop)
            results = tuple(x[here] for x in out)
            adamw(*(x[here] for x in inputs), tuple(numbers[group]), results)

        over_rows(part, end - begin, _LEAST)


def launch(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, split: int, step: int, rates: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in Triton, in one launch."""
    out = w.new_empty(len(w)), w.new_empty(len(w)), w.new_empty(len(w))
    _launch(w, grad, m, v, split, step, rates, out=out)
    return out


def launch_inplace(w: Tensor, grad: Tensor, m: Tensor, v: Tensor, *more: Any) -> None:
    """`update` in Triton."""
    _launch(w, grad, m, v, *more, out=(w, m, v))


def _launch(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, split: int, step: int, rates: Rates,
    *, out: tuple[Tensor, ...],
) -> None:  # fmt: skip
    import torch

    from lorasurgery.kernels._training_triton import ADAMW, adamw
    from lorasurgery.kernels._tuning import Config, tuned

    numbers, n = torch.from_numpy(rates.numbers(step)).to(w.device), len(w)
    inputs = [x.contiguous() for x in (w, grad, m, v)]

    def start(config: Config, results: Sequence[Tensor] = out) -> None:
        adamw[(-(-n // config["SIZE"]),)](
            *inputs, numbers, *results, n, split, **config, enable_fp_fusion=False
        )

    # a step in place may not be tried twice
    spare = cache(lambda: [torch.empty_like(x) for x in out])
    if n:
        tuned("adamw", ADAMW, (w,), start, lambda config: start(config, spare()))


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """All A, all B, both; first and late steps; no gradient at all; sizes about a program's."""
    import torch

    for n, split in ((1, 0), (1, 1), (1500, 700), (1024, 1024), (0, 0)):
        w, grad = torch.randn(2, n, generator=rng)
        m, v = 0.1 * torch.randn(n, generator=rng), torch.rand(n, generator=rng)
        yield f"{n}-{split}", (w, 0.1 * grad, m, v, split, 7, Rates(1e-3))
    zero = torch.zeros(300)
    w = torch.randn(300, generator=rng)
    yield "first", (w, torch.randn(300, generator=rng), zero, zero, 100, 1, Rates(2e-4, 4.0))
    yield "no-gradient", (w, zero, zero, zero, 100, 1, Rates(2e-4, weight_decay=0.0))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A square of elements, half of them B's, for a clock."""
    import torch

    w, grad, m, v = torch.rand(4, side * side, generator=rng)
    return w, grad, m, v, side * side // 2, 7, Rates(1e-4)
