"""LoRA: ΔW = s · B A.

Hu et al. 2021, arXiv 2106.09685, §4.1; rsLoRA's s: Kalajdzievski 2023, arXiv 2312.03732.

LoRA+, LoRA-FA and the initialisations differ in training alone: at rest their files are this.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import Base
    from lorasurgery.arrays import A

LINEAR_IN_W = True
ROWS = ("B",)


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [r, in];  B: [out, r]."""
    return {"A": (config.rank, in_), "B": (out, config.rank)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = 0, so ΔW = 0 and training starts at the base model."""
    import torch

    out, in_ = w.shape
    bound = 1 / math.sqrt(in_)
    a = torch.empty(config.rank, in_).uniform_(-bound, bound, generator=rng)
    return {"A": a, "B": torch.zeros(out, config.rank)}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in], or [experts, out, in] from stacked factors."""
    change: A = config.scaling * (factors["B"] @ factors["A"])
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ without forming ΔW: x [..., in] -> [..., out]."""
    return x @ w.T + detour(x, factors, config)


def detour(
    x: Tensor,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    base: Base | None = None,  # noqa: ARG001 - free of W
) -> Tensor:
    """X ΔWᵀ: x [..., in] -> [..., out]."""
    return config.scaling * (x @ factors["A"].T) @ factors["B"].T


def product(factors: Mapping[str, Tensor], config: AdapterConfig) -> tuple[Tensor, Tensor, float]:
    """A, B and s, of which `detour` is s · (X Aᵀ) Bᵀ."""
    return factors["A"], factors["B"], config.scaling


def from_lora(w: A, a: A, b: A) -> dict[str, A]:  # noqa: ARG001 - free of W
    """They are themselves."""
    return {"A": a, "B": b}


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: the nearest of rank r is given."""
    return None


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A]:
    """A and s · B."""
    return factors["A"], config.scaling * factors["B"]
