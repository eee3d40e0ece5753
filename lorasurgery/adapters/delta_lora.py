"""Delta-LoRA: W moves by λ times each step of s · B A, so ΔW = s ((1 + λ) B A - λ B₀ A₀).

Zi et al. 2023, arXiv 2309.02411, §3. With a constant λ the steps add up to the difference to a snapshot
B₀ A₀, taken when W begins to move: a LoRA of rank 2 r. The factors belong to the base they were trained on.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import lora

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import Base
    from lorasurgery.arrays import A

LINEAR_IN_W = True
ROWS = ("B", "B0")
BOUND = True  # to one base, whose hash a site has in extra['base']

LAMBDA = 2.0  # of the paper's experiments with E2E


def strength(config: AdapterConfig) -> float:
    """λ, from extra['lambda']."""
    said: Any = config.extra.get("lambda", LAMBDA)
    return float(said)


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A, A0: [r, in];  B, B0: [out, r]."""
    a, b = (config.rank, in_), (out, config.rank)
    return {"A": a, "B": b, "A0": a, "B0": b}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = B₀ = 0, so ΔW = 0."""
    factors = lora.init(w, config, rng)
    return {**factors, "A0": factors["A"].clone(), "B0": factors["B"].clone()}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in]."""
    a, b = low_rank(factors, config)
    change: A = b @ a
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ: x [..., in] -> [..., out]; the λ parts have no gradient, as the paper's W has none."""
    return x @ w.T + detour(x, factors, config)


def detour(
    x: Tensor,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    base: Base | None = None,  # noqa: ARG001 - free of W
) -> Tensor:
    """X ΔWᵀ: x [..., in] -> [..., out]; x has the gradient of all of it."""
    s, strong = config.scaling, strength(config)
    branch = s * (x @ factors["A"].T) @ factors["B"].T
    moved = (x @ factors["A"].detach().T) @ factors["B"].detach().T
    past = (x @ factors["A0"].detach().T) @ factors["B0"].detach().T
    return branch + strong * s * (moved - past)


def from_lora(w: A, a: A, b: A) -> dict[str, A]:  # noqa: ARG001 - free of W
    """With the snapshot just taken, so that λ has moved nothing yet."""
    return {"A": a, "B": b, "A0": a, "B0": b}


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: what `from_lora` makes of the nearest of rank r."""
    return None


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A]:
    """[A; A₀] and s [(1 + λ) B, -λ B₀]: rank 2 r."""
    s, strong = config.scaling, strength(config)
    left = [s * (1 + strong) * factors["B"], -s * strong * factors["B0"]]
    # numpy's concatenate, or torch's; a product is no nn.Parameter
    join: Any = sys.modules[type(left[0]).__module__].concatenate
    return join([factors["A"], factors["A0"]]), join(left, -1)
