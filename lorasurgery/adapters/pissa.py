"""PiSSA: ΔW = s (B A - B₀ A₀(W)), where s B₀ A₀ is W's best approximation of rank r.

Meng et al. 2024, arXiv 2404.02948, §3. A file of it that was not converted to LoRA holds A and B alone: the
start is made of the base again, as PEFT makes it when it loads them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = False


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [r, in];  B: [out, r]."""
    return {"A": (config.rank, in_), "B": (out, config.rank)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:  # noqa: ARG001
    """A₀ = √(S / s) Vᵀ and B₀ = U √(S / s) of the r largest singular values S."""
    u, s, v = _largest(w, config.rank)
    root = (s / config.scaling) ** 0.5
    return {"A": root[:, None] * v, "B": u * root}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in]."""
    u, s, v = _largest(w, config.rank)
    change: A = config.scaling * (factors["B"] @ factors["A"]) - (u * s) @ v
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base without its largest part, and beside it B A: x [..., in] -> [..., out]."""
    u, s, v = _largest(w, config.rank)
    rest = x @ w.T - (x @ v.T) @ (u * s).T
    return rest + config.scaling * (x @ factors["A"].T) @ factors["B"].T


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """B A + s B₀ A₀ has twice the rank."""
    return None


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: the start would have to be of low rank as well."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """The change is made of W."""
    return None


def low_rank_on(w: A, factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A]:
    """A and B of rank 2 r with delta = B A, once W is known."""
    u, s, v = _largest(w, config.rank)
    root = s**0.5
    # numpy's concatenate, or torch's
    join: Any = sys.modules[type(w).__module__].concatenate
    left = [config.scaling * factors["B"], -u * root]
    return join([factors["A"], root[:, None] * v]), join(left, -1)


def _largest(w: A, rank: int) -> tuple[A, A, A]:
    """U [out, r], S [r] and Vᵀ [r, in], float32."""
    if isinstance(w, np.ndarray):
        u, s, v = np.linalg.svd(w, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    import torch

    left, values, right = torch.linalg.svd(w, full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]
