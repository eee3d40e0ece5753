"""GLoRA: ΔW = s · (W A₁ A₂ + B₁ B₂): a LoRA on what W makes of a LoRA, and another beside it.

Chavan et al. 2023, arXiv 2306.07967, §3.2, in the form of LyCORIS, without its vectors. Of a convolution A₁ A₂
mixes channels alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorasurgery.adapter import AdapterConfig

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import A

LINEAR_IN_W = False


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A1 [in, r], of a convolution its channels, A2 turned;  B1 [out, r], B2 [r, in]."""
    r = config.rank
    return {"A1": (in_, r), "A2": (r, in_), "B1": (out, r), "B2": (r, in_)}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """A2 = B2 = 0; the others uniform, by their last dimension."""
    import torch

    made = {}
    for name, shape in shapes(w.shape[0], w[0].numel(), config).items():
        bound = 0.0 if name in ("A2", "B2") else 1 / math.sqrt(shape[1])
        made[name] = torch.empty(shape).uniform_(-bound, bound, generator=rng)
    return made


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in], a convolution's flat."""
    a1, a2 = factors["A1"], factors["A2"]
    # seen by channels, which A₁ A₂ mixes
    channels = w.reshape(len(w), len(a1), -1).swapaxes(1, 2)
    mixed = ((channels @ a1) @ a2).swapaxes(1, 2).reshape(w.shape)
    change: A = config.scaling * (mixed + factors["B1"] @ factors["B2"])
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """W on x + s A₁ A₂ x, and s B₁ B₂ x: x [..., in] -> [..., out]."""
    mixed = (x @ factors["A2"].T) @ factors["A1"].T
    beside = (x @ factors["B2"].T) @ factors["B1"].T
    s = config.scaling
    # of W A₁ A₂, A₁ stands next to W
    return (x + s * mixed) @ w.T + s * beside


def from_lora(w: A, a: A, b: A) -> dict[str, A]:  # noqa: ARG001 - free of W
    """Nothing on W's side."""
    zero = a * 0
    return {"A1": zero.swapaxes(0, 1), "A2": zero, "B1": b, "B2": a}


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """The change is made of W."""
    return None
