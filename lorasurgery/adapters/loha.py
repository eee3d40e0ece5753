"""LoHa: ΔW = s · (B₁ A₁) ∘ (B₂ A₂), an elementwise product, of rank r² at most.

Hyeon-Woo et al. 2022 (FedPara), arXiv 2108.06098, §2.2, Prop. 1; for convolutions Prop. 3, where each
product is B (T ×₂ A) with a core T. s is applied once, as LyCORIS' and PEFT's forward do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = True


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A1, A2: [r, in];  B1, B2: [out, r];  with extra['kernel'] T1, T2: [r, r, *kernel], `in` by channels."""
    r, kernel = config.rank, tuple(_kernel(config))
    plain: dict[str, tuple[int, ...]] = {
        "B1": (out, r),
        "A1": (r, in_),
        "B2": (out, r),
        "A2": (r, in_),
    }
    if not kernel:
        return plain
    channels = in_ // math.prod(kernel)
    cores: dict[str, tuple[int, ...]] = {"T1": (r, r, *kernel), "T2": (r, r, *kernel)}
    return {**plain, "A1": (r, channels), "A2": (r, channels), **cores}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """A2 = 0, so ΔW = 0; the others uniform, by their last dimension."""
    import torch

    made = {}
    for name, shape in shapes(w.shape[0], w[0].numel(), config).items():
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        made[name] = torch.empty(shape).uniform_(-bound, bound, generator=rng)
    made["A2"].zero_()
    return made


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in], a convolution's flat."""
    left, right = (factors[f"B{i}"] @ _a(factors, i) for i in (1, 2))
    change: A = config.scaling * left * right
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ: x [..., in] -> [..., out]. An elementwise product has no shorter way than ΔW."""
    return x @ w.T + x @ delta(w, factors, config).T


def from_lora(w: A, a: A, b: A) -> dict[str, A]:  # noqa: ARG001 - free of W
    """The second product is made of ones alone: rank 1, its other rows and columns are 0."""
    ones_a, ones_b = a * 0, b * 0
    ones_a[0], ones_b[:, 0] = 1, 1
    return {"B1": b, "A1": a, "B2": ones_b, "A2": ones_a}


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: the nearest has no closed form; `from_lora` makes one that is as near as a LoRA."""
    return None


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A] | None:
    """Rows of B and columns of A multiplied pair by pair: rank r², where that is less than half of W's."""
    a1, a2, b1, b2 = _a(factors, 1), _a(factors, 2), factors["B1"], factors["B2"]
    rank = len(a1) * len(a2)
    if 2 * rank >= min(len(b1), a1.shape[1]):
        return None
    a = (a1[:, None, :] * a2[None, :, :]).reshape(rank, -1)
    b = (b1[:, :, None] * b2[:, None, :]).reshape(-1, rank)
    return a, config.scaling * b


def _a(factors: Mapping[str, A], i: int) -> A:
    """A [r, in]; a convolution's is Σⱼ T[:, j, kernel] A[j, channel], flat."""
    a = factors[f"A{i}"]
    if f"T{i}" not in factors:
        return a
    core = factors[f"T{i}"]
    core = core.reshape(len(core), len(a), -1).swapaxes(1, 2)  # [r, kernel, r]
    folded: A = (core @ a).swapaxes(1, 2).reshape(len(core), -1)
    return folded


def _kernel(config: AdapterConfig) -> tuple[int, ...]:
    kernel = config.extra.get("kernel", ())
    assert isinstance(kernel, tuple)
    return kernel
