"""DoRA's gain on another change: W' = m ∘ V / ‖V‖ with V = W + ΔW, ΔW a LoHa's or a LoKr's.

LyCORIS' weight decomposition (its dora_wd). extra['of'] names the variant that ΔW is of; m is [out, 1], or
[1, channels] where each column is normed, of a convolution all columns of a channel together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Variant

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import A

LINEAR_IN_W = False


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """Those of the change, and m [out, 1]."""
    return {**inner(config).shapes(out, in_, config), "m": (out, 1)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """ΔW = 0 and m = ‖W‖."""
    return {**inner(config).init(w, config, rng), "m": (w * w).sum(-1, keepdim=True) ** 0.5}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW = (m / ‖V‖) V - W [out, in], a convolution's flat."""
    v = w + inner(config).delta(w, factors, config)
    m = factors["m"]
    if m.shape[-1] == 1:
        norm = ((v * v).sum(-1) ** 0.5)[:, None]
        by_row: A = m / (norm + (norm == 0)) * v - w
        return by_row
    channels = v.reshape(len(w), m.shape[1], -1)
    squares = (channels * channels).sum(0).sum(-1)
    norm = (squares**0.5)[None, :, None]
    by_channel: A = (m[:, :, None] / (norm + (norm == 0)) * channels).reshape(w.shape) - w
    return by_channel


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X W'ᵀ: x [..., in] -> [..., out]."""
    return x @ w.T + x @ delta(w, factors, config).T


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """DoRA is that by its own name."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """None: the gain changes W itself, with all its rank."""
    return None


def inner(config: AdapterConfig) -> Variant:
    """The variant that the change is of."""
    return cast(Variant, plugins.load("adapters", str(config.extra.get("of", "loha"))))
