"""Diag-OFT: W' = l ∘ (Rᵀ W), R block-diagonal of rotations of the outputs: R = (I + Q)(I - Q)⁻¹, Q = B - Bᵀ.

LyCORIS' and kohya's form of Qiu et al. 2023, arXiv 2306.07280; PEFT's turns the inputs (adapters/oft.py).
extra['constraint']: all blocks of Q together are no longer than that, if it is more than 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import ShapeError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import A

LINEAR_IN_W = False


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:  # noqa: ARG001
    """Q [blocks, b, b], b the largest divisor of out up to the rank;  l [out, 1] with extra['rescaled']."""
    size = max(n for n in range(1, config.rank + 1) if out % n == 0)
    found: dict[str, tuple[int, ...]] = {"Q": (out // size, size, size)}
    return {**found, "l": (out, 1)} if config.extra.get("rescaled") else found


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:  # noqa: ARG001
    """Q = 0 and l = 1."""
    import torch

    made = shapes(w.shape[0], w[0].numel(), config)
    return {n: torch.ones(s) if n == "l" else torch.zeros(s) for n, s in made.items()}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in], a convolution's flat."""
    turn = _turn(factors["Q"], config)
    if len(w) != len(turn) * turn.shape[1]:
        raise ShapeError(
            f"diag_oft: {len(turn)} blocks of {turn.shape[1]} do not make up the {len(w)} outputs of a "
            f"weight {list(w.shape)}. Is it the adapter's base?"
        )
    blocks = w.reshape(len(turn), turn.shape[1], -1)
    change: A = (turn @ blocks).reshape(w.shape)
    if "l" in factors:
        scale = factors["l"].reshape(-1, *(1 for _ in w.shape[1:]))
        change = scale * change + (scale - 1) * w
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The outputs turned block by block, and scaled: x [..., in] -> [..., out]."""
    turn = _turn(factors["Q"], config)
    out = x @ w.T
    blocks = out.reshape(*out.shape[:-1], len(turn), turn.shape[1], 1)
    turned = out + (turn @ blocks).reshape(out.shape)
    return turned * factors["l"].flatten() if "l" in factors else turned


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """A rotation of W is no sum with B A."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """The change is made of W."""
    return None


def _turn(b: A, config: AdapterConfig) -> A:
    """Rᵀ - I = -2 (I + Q)⁻¹ Q [blocks, b, b]."""
    q = b - b.swapaxes(1, 2)
    most = float(str(config.extra.get("constraint", 0)))
    length = float((q * q).sum() ** 0.5) + 1e-8
    if 0 < most < length:
        q = q * (most / length)
    if isinstance(q, np.ndarray):
        return -2 * np.linalg.solve(np.eye(q.shape[1], dtype=q.dtype) + q, q)
    import torch

    turned: A = -2 * torch.linalg.solve(torch.eye(q.shape[1]).to(q) + q, q)
    return turned
