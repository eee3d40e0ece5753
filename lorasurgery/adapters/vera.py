"""VeRA: ΔW = diag(b) B diag(d) A, with A and B random, frozen, and shared by all modules.

Kopiczko et al. 2023, arXiv 2310.11454, §3.1. b and d are trained; there is no alpha. A module takes the
first columns of A and the first rows of B, as many as it has inputs and outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import A, Base

LINEAR_IN_W = True
ROWS = ("B", "b")


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [r, in];  B: [out, r];  d: [r];  b: [out]."""
    return {"A": (config.rank, in_), "B": (out, config.rank), "d": (config.rank,), "b": (out,)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = 0, so ΔW = 0; d = 0.1; projections of this module alone, where all should share them."""
    import torch

    out, in_ = w.shape
    a, b = projections(config.rank, in_, out, rng)
    return {"A": a, "B": b, "d": torch.full((config.rank,), 0.1), "b": torch.zeros(out)}


def projections(rank: int, in_: int, out: int, rng: Generator) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] for the widest modules: kaiming uniform, A drawn first."""
    import torch

    a, b = torch.empty(rank, in_), torch.empty(out, rank)
    for matrix in (a, b):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(matrix.shape[1]))
        matrix.uniform_(-bound, bound, generator=rng)
    return a, b


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in]."""
    a, b = low_rank(factors, config)
    change: A = b @ a
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ: x [..., in] -> [..., out]."""
    return x @ w.T + detour(x, factors, config)


def detour(
    x: Tensor,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,  # noqa: ARG001 - it has no alpha
    base: Base | None = None,  # noqa: ARG001 - free of W
) -> Tensor:
    """X ΔWᵀ: x [..., in] -> [..., out]; no projection is scaled, so that none is copied."""
    return ((x @ factors["A"].T) * factors["d"]) @ factors["B"].T * factors["b"]


def from_lora(w: A, a: A, b: A) -> None:
    """None: two vectors cannot hold what A and B were trained to be."""


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A]:  # noqa: ARG001
    """A and diag(b) B diag(d)."""
    return factors["A"], factors["b"][:, None] * factors["B"] * factors["d"]
