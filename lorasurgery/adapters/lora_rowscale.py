"""LoRA and a scale for each row: y = g ∘ (W x) + s · B (A x), so ΔW = (g - 1) W + s · B A.

What a trained DoRA is (arXiv 2402.09353), exactly, in a form that is served beside W without knowing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import dora, lora

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = False
ROWS = ("B", "g")


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [r, in];  B: [out, r];  g: [out, 1]."""
    return {**lora.shapes(out, in_, config), "g": (out, 1)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = 0 and g = 1, so ΔW = 0."""
    factors = lora.init(w, config, rng)
    return {**factors, "g": factors["B"].new_ones(len(w), 1)}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in]."""
    change = lora.delta(w, factors, config)
    change += (factors["g"] - 1) * w
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ: x [..., in] -> [..., out]."""
    beside = config.scaling * (x @ factors["A"].T) @ factors["B"].T
    return factors["g"].T * (x @ w.T) + beside


def from_lora(w: A, a: A, b: A) -> dict[str, A]:
    """With every row as it is."""
    return {"A": a, "B": b, "g": 0 * w[:, :1] + 1}


def from_dora(w: A, factors: Mapping[str, A], config: AdapterConfig) -> dict[str, A] | None:
    """The same change as a DoRA's, exactly; None where it norms columns."""
    if factors["m"].shape[-1] != 1:
        return None
    g = dora.gain(w + lora.delta(w, factors, config), factors["m"])
    return {"A": factors["A"], "B": g * factors["B"], "g": g}


def from_delta(
    w: A,
    delta: A,
    lora: tuple[A, A],
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A]:
    """What B A leaves of each row of ΔW projected onto that of W: never farther than the LoRA is."""
    a, b = lora
    length = (w * w).sum(-1)[..., None]
    along = ((delta - b @ a) * w).sum(-1)[..., None]
    return {"A": a, "B": b, "g": 1 + along / (length + (length == 0))}


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> None:
    """None: the scale changes W itself, with all its rank."""
