"""DoRA: W' = m ∘ V / ‖V‖ with V = W + s · B A, a norm for each row of W and a magnitude m for it.

Liu et al. 2024, arXiv 2402.09353, §4.1; the norm counts as a constant in training, §4.3. The paper writes
W turned, and so calls the norm column-wise. m is [out, 1], or [1, in] where each column is normed, as
PEFT does it in embeddings: its shape tells. A row of V that is all zero stays zero, whatever its m.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Generator, Tensor

    from lorasurgery.adapter import Base
    from lorasurgery.arrays import A, Array

LINEAR_IN_W = False
ROWS = ("B", "m")


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [r, in];  B: [out, r];  m: [out, 1]."""
    return {"A": (config.rank, in_), "B": (out, config.rank), "m": (out, 1)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = 0 and m = ‖W‖, so W' = W."""
    import torch

    out, in_ = w.shape
    bound = 1 / math.sqrt(in_)
    a = torch.empty(config.rank, in_).uniform_(-bound, bound, generator=rng)
    return {"A": a, "B": torch.zeros(out, config.rank), "m": _norm(w, -1)}


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW = (m / ‖V‖) V - W [out, in]."""
    v: A = (config.scaling * factors["B"]) @ factors["A"]
    v += w
    change: A = gain(v, factors["m"]) * v
    change -= w
    return change


def merged_by(
    factors: Mapping[str, Array], config: AdapterConfig
) -> tuple[ModuleType, tuple[Array, ...]]:
    """The kernel that makes some rows W' of W in one pass, and its arguments after W."""
    from lorasurgery.kernels import dora_merge

    b = factors["B"] * factors["B"].dtype.type(config.scaling)
    return dora_merge, (factors["A"], b, factors["m"].reshape(-1))


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """X W'ᵀ: x [..., in] -> [..., out]; no gradient flows through the norm."""
    m = factors["m"]
    v = w + config.scaling * factors["B"] @ factors["A"]
    g = gain(v.detach(), m)
    if m.shape[-1] != 1:
        return x @ (g * v).T
    return g.T * (x @ w.T + config.scaling * (x @ factors["A"].T) @ factors["B"].T)


def detour(x: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig, base: Base) -> Tensor:
    """What is added to x Wᵀ: (g - 1) ∘ x Wᵀ + g ∘ s · x (B A)ᵀ; no gradient flows through the norm."""
    import torch

    with torch.no_grad():
        norm = _norm(base.weight() + (config.scaling * factors["B"]) @ factors["A"], -1)
    g = (factors["m"] / (norm + (norm == 0)))[:, 0]
    branch = config.scaling * (x @ factors["A"].T) @ factors["B"].T
    return (g - 1) * base.product(x) + g * branch


def from_lora(w: A, a: A, b: A) -> dict[str, A]:
    """The magnitudes that W + B A has already."""
    return {"A": a, "B": b, "m": _norm(w + b @ a, -1)}


def from_delta(
    w: A,
    delta: A,
    lora: tuple[A, A],
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A]:
    """Each row of W + ΔW projected onto that of W + B A: never farther from it than the LoRA is."""
    a, b = lora
    v = w + b @ a
    norm = _norm(v, -1)
    along = ((w + delta) * v).sum(-1)[..., None]
    return {"A": a, "B": b, "m": along / (norm + (norm == 0))}


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> None:
    """None: the gain changes W itself, with all its rank."""


def gain(v: A, m: A) -> A:
    """M / ‖V‖; where V is zero, anything that is finite."""
    norm = _norm(v, -1 if m.shape[-1] == 1 else -2)
    found: A = m / (norm + (norm == 0))
    return found


def _norm(v: A, axis: int) -> A:
    squares = (v * v).sum(axis)
    norm: A = squares**0.5
    return norm[..., None] if axis == -1 else norm[..., None, :]
