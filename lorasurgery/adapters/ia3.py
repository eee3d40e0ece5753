"""IA3: W' = diag(l) W, and the bias with it; of feed-forward modules W' = W diag(l).

Liu et al. 2022, arXiv 2205.05638, §3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = False
ROWS = ("l",)


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """L [out, 1]; with extra['feedforward'] [1, in], of a convolution its channels."""
    return {"l": (1, in_) if config.extra.get("feedforward") else (out, 1)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:  # noqa: ARG001
    """Ones."""
    import torch

    return {"l": torch.ones(shapes(w.shape[0], w[0].numel(), config)["l"])}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """(l - 1) times each row, or each column (of a convolution all columns of a channel)."""
    less = factors["l"] - 1
    if not config.extra.get("feedforward"):
        scaled: A = w * less
        return scaled
    channels = w.reshape(len(w), less.shape[1], -1)
    change: A = (channels * less[:, :, None]).reshape(w.shape)
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """The inputs or the outputs scaled: x [..., in] -> [..., out]."""
    scale = factors["l"].flatten()
    return (x * scale) @ w.T if config.extra.get("feedforward") else (x @ w.T) * scale


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """Scales of rows are no sum with B A."""
    return None


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: a bias, if there is one, would be scaled as well."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """The change is made of W."""
    return None
