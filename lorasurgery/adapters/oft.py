"""OFT: W' = W Rᵀ, R block-diagonal of rotations, each from a skew-symmetric Q by Cayley: R = (I + Q)⁻¹ (I - Q).

Qiu et al. 2023, arXiv 2306.07280, §3; as a Neumann series cut off: Qiu et al. 2025 (OFTv2), arXiv 2506.19847.
Its sign is PEFT's: R = I + 2 Q + 2 Q² + ... + Qⁿ, the Cayley transform of -Q.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import AdapterConfig
from lorasurgery.arrays import alike
from lorasurgery.errors import ShapeError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = False


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:  # noqa: ARG001
    """R [blocks, b (b - 1) / 2]: what is above the diagonals; rank blocks of b = in / rank, or one for all."""
    size = in_ // config.rank
    return {"R": (1 if config.extra.get("block_share") else config.rank, size * (size - 1) // 2)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:  # noqa: ARG001
    """Q = 0, so R = I."""
    import torch

    return {"R": torch.zeros(shapes(w.shape[0], w[0].numel(), config)["R"])}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """W (R - I)ᵀ [out, in]; of an embedding [tokens, dim] W (R - I)."""
    turn = _rotations(factors["R"], config)
    size = turn.shape[1]
    if w.shape[1] % size:
        raise ShapeError(
            f"oft: blocks of {size} do not make up the {w.shape[1]} inputs of a weight "
            f"{list(w.shape)}. Is it the adapter's base?"
        )
    blocks = w.reshape(len(w), -1, size).swapaxes(0, 1)  # [blocks, out, size]
    if not config.extra.get("embedding"):
        turn = turn.swapaxes(1, 2)
    change: A = (blocks @ turn).swapaxes(0, 1).reshape(w.shape)
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The inputs turned block by block: x [..., in] -> [..., out]."""
    turn = _rotations(factors["R"], config)
    blocks = x.reshape(*x.shape[:-1], -1, 1, turn.shape[1])
    return (x + (blocks @ turn).reshape(x.shape)) @ w.T


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """A rotation of W is no sum with B A."""
    return None


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: no rotation of W is near a sum."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """The change is made of W."""
    return None


def block_size(elements: int) -> int:
    """The b with b (b - 1) / 2 elements above its diagonal; 0 if there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements else 0


def _rotations(vectors: A, config: AdapterConfig) -> A:
    """R - I [blocks, b, b]."""
    q = _skew(vectors)
    if config.extra.get("coft"):
        q = _near(q, float(str(config.extra.get("eps", 6e-5))))
    if not config.extra.get("use_cayley_neumann", True):
        return _cayley(q)
    terms = int(str(config.extra.get("num_cayley_neumann_terms", 5)))
    if terms < 3:
        series: A = 2 * q * (terms - 1)
        return series
    power = q
    total = 2 * q
    # PEFT makes no difference between 3 and 4 terms
    for _ in range(max(terms, 4) - 3):
        power = power @ q
        total = total + 2 * power
    whole: A = total + power @ q
    return whole


def _skew(vectors: A) -> A:
    """Q [blocks, b, b] of what is above its diagonals."""
    size = block_size(vectors.shape[1])
    if size < 2:
        return alike(vectors, np.zeros((len(vectors), 1, 1), np.float32))
    sign = np.triu(np.ones((size, size), np.float32), 1)
    where = np.zeros((size, size), np.int64)
    where[np.triu_indices(size, 1)] = np.arange(vectors.shape[1])
    where += where.T
    picked: A = vectors[:, where.reshape(-1)].reshape(-1, size, size)
    skew: A = picked * alike(vectors, sign - sign.T)
    return skew


def _near(q: A, eps: float) -> A:
    """COFT: Q no longer than eps / √blocks."""
    most = eps / math.sqrt(len(q))
    norm = (q * q).reshape(len(q), -1).sum(1).reshape(-1, 1, 1) ** 0.5
    kept: A = q * (most / norm.clip(most, None))
    return kept


def _cayley(q: A) -> A:
    """(I + Q)⁻¹ (I - Q) - I = -2 (I + Q)⁻¹ Q."""
    eye = alike(q, np.eye(q.shape[1], dtype=np.float32))
    if isinstance(q, np.ndarray):
        return -2 * np.linalg.solve(eye + q, q)
    import torch

    turned: A = -2 * torch.linalg.solve(eye + q, q)
    return turned
