"""OLoRA: ΔW = s (B A - Qᵣ Rᵣ), with W = Q R and of it the first r columns of Q and rows of R.

Büyükakyüz 2024, arXiv 2406.01775, §3. A file of it that was not converted to LoRA holds A and B alone: the
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
    """Rᵣ and Qᵣ."""
    q, r = _first(w, config.rank)
    return {"A": r, "B": q}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in]."""
    q, r = _first(w, config.rank)
    change: A = config.scaling * (factors["B"] @ factors["A"] - q @ r)
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The base without its start, and beside it B A: x [..., in] -> [..., out]."""
    q, r = _first(w, config.rank)
    added = (x @ factors["A"].T) @ factors["B"].T - (x @ r.T) @ q.T
    return x @ w.T + config.scaling * added


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """B A + Qᵣ Rᵣ has twice the rank."""
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
    q, r = _first(w, config.rank)
    # numpy's concatenate, or torch's
    join: Any = sys.modules[type(w).__module__].concatenate
    return join([factors["A"], r]), config.scaling * join([factors["B"], -q], -1)


def _first(w: A, rank: int) -> tuple[A, A]:
    """Qᵣ [out, r] and Rᵣ [r, in], float32."""
    if isinstance(w, np.ndarray):
        q, r = np.linalg.qr(w)
        return q[:, :rank], r[:rank]
    import torch

    columns, rows = torch.linalg.qr(w)
    return columns[:, :rank], rows[:rank]
