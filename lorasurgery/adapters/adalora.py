"""AdaLoRA: ΔW = alpha / (r₀ + 1e-5) · P diag(E) Q, pruned by zeros in E or by leaving triplets out.

Zhang et al. 2023, arXiv 2303.10512, §3.1. r₀ is the rank at the start (config.rank), whatever is left of it:
its authors found that scaling by the rank that is left hurts. P is called B here, and Q is called A.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import Base
    from lorasurgery.arrays import A

LINEAR_IN_W = True
ROWS = ("B",)


def kept(config: AdapterConfig) -> int:
    """How many triplets are left of config.rank."""
    left: Any = config.extra.get("kept", config.rank)
    return int(left)


def scale(config: AdapterConfig) -> float:
    """As the authors' code has it, with its 1e-5."""
    return config.alpha / (config.rank + 1e-5)


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [k, in];  E: [k, 1];  B: [out, k], of the k triplets that are left."""
    k = kept(config)
    return {"A": (k, in_), "E": (k, 1), "B": (out, k)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """E = 0, so ΔW = 0; A and B from N(0, 0.02²)."""
    import torch

    out, in_ = w.shape
    made = shapes(out, in_, config)
    factors = {name: 0.02 * torch.randn(made[name], generator=rng) for name in "AB"}
    return {**factors, "E": torch.zeros(made["E"])}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:  # noqa: ARG001 - free of W
    """ΔW [out, in]."""
    change: A = factors["B"] @ (scale(config) * factors["E"] * factors["A"])
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X (W + ΔW)ᵀ: x [..., in] -> [..., out]."""
    return x @ w.T + detour(x, factors, config)


def detour(
    x: Tensor,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    base: Base | None = None,  # noqa: ARG001 - free of W
) -> Tensor:
    """X ΔWᵀ: x [..., in] -> [..., out]."""
    return x @ (scale(config) * factors["E"] * factors["A"]).T @ factors["B"].T


def product(factors: Mapping[str, Tensor], config: AdapterConfig) -> tuple[Tensor, Tensor, float]:
    """E A, B and s, of which `detour` is s · (X (E A)ᵀ) Bᵀ."""
    return factors["E"] * factors["A"], factors["B"], scale(config)


def from_lora(w: A, a: A, b: A) -> dict[str, A]:  # noqa: ARG001 - free of W
    """Its singular triplets: A's rows and B's columns are orthonormal, as training wants them."""
    rank = len(a)
    grown = (rank + 1e-5) / rank
    if rank > min(a.shape[1], b.shape[0]):  # so many directions there are not
        return {"A": a, "E": 0 * a[:, :1] + grown, "B": b}
    # numpy's linalg, or torch's
    linalg: Any = sys.modules[type(a).__module__].linalg
    left, upper = linalg.qr(b)
    right, lower = linalg.qr(a.T)
    u, e, v = linalg.svd(upper @ lower.T)
    return {"A": v @ right.T, "E": grown * e[:, None], "B": left @ u}


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: what `from_lora` makes of the nearest of rank r."""
    return None


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> tuple[A, A]:
    """Without the triplets that E has pruned; s √|E| on either side, so that both are of one size."""
    e = factors["E"][:, 0]
    left = e != 0
    root = (scale(config) * abs(e[left])) ** 0.5
    sign = e[left] / abs(e[left])
    return root[:, None] * factors["A"][left], factors["B"][:, left] * (sign * root)
