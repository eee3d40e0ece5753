"""MoRAL-style mixture: y = W x + s Σᵢ gᵢ(x) Bᵢ Aᵢ x over the k experts that a router chooses for each token.

Yang et al. 2024, arXiv 2402.11260, §3, which leaves the gates open: here they are a softmax over the k largest
of router · x, so that they sum to 1. They depend on x, so no ΔW does the same; a mixture with gates that are
fixed is a LoRA of rank N r.

Layers of one block may have one router: the first layer's, whose input is the block's. extra['router'] of the others
names that layer; they have no router of their own, and `added` is given its gates.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.adapter import AdapterConfig
from lorasurgery.arrays import alike
from lorasurgery.errors import MatchError

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from lorasurgery.adapter import Base
    from lorasurgery.arrays import A

LINEAR_IN_W = True
ROUTED = True  # what it does depends on the token


def experts(config: AdapterConfig) -> int:
    """N, from extra['experts']."""
    said: Any = config.extra.get("experts", 8)
    return int(said)


def chosen(config: AdapterConfig) -> int:
    """K, from extra['top_k']."""
    said: Any = config.extra.get("top_k", 2)
    return min(int(said), experts(config))


def follows(config: AdapterConfig) -> str:
    """The module whose router chooses here too; empty: this one's own does."""
    return str(config.extra.get("router") or "")


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """A: [N, r, in];  B: [N, out, r];  router: [N, in], unless another layer has it."""
    n, r = experts(config), config.rank
    own = {} if follows(config) else {"router": (n, in_)}
    return {"A": (n, r, in_), "B": (n, out, r), **own}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """B = 0, so nothing is added; each A its own, or the experts would never part; router N(0, 0.02²)."""
    import torch

    out, in_ = w.shape
    made = shapes(out, in_, config)
    bound = 1 / math.sqrt(in_)
    factors = {
        "A": torch.empty(made["A"]).uniform_(-bound, bound, generator=rng),
        "B": torch.zeros(made["B"]),
    }
    if "router" in made:
        factors["router"] = 0.02 * torch.randn(made["router"], generator=rng)
    return factors


def gates(x: Tensor, router: Tensor, config: AdapterConfig) -> Tensor:
    """[..., N], zero but for the k that are chosen, which sum to 1: x [..., in]."""
    import torch

    logits = x @ router.T
    top, index = logits.topk(chosen(config), dim=-1)
    # autocast multiplies in bfloat16, and not everything else
    return torch.zeros_like(logits).scatter(-1, index, top.softmax(-1).to(logits.dtype))


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """Raises MatchError: there is none."""
    raise MatchError(
        f"moral: its {len(factors['A'])} experts are chosen for each token, so no merged weight "
        f"{list(w.shape)} does what they do. Convert it to a static mixture at scaling "
        f"{config.scaling:g}, or serve it unmerged."
    )


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """x [..., in] -> [..., out]; an expert sees the tokens alone that chose it."""
    return x @ w.T + detour(x, factors, config)


def detour(
    x: Tensor,
    factors: Mapping[str, Tensor],
    config: AdapterConfig,
    base: Base | None = None,  # noqa: ARG001 - free of W
) -> Tensor:
    """What is added to x Wᵀ. Raises MatchError for a layer whose gates are another's."""
    if "router" not in factors:
        raise MatchError(
            f"moral: the router of {follows(config)} chooses the experts here too. Run the whole block."
        )
    return added(x, gates(x, factors["router"], config), factors, config)


def added(x: Tensor, gate: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """s Σᵢ gᵢ Bᵢ Aᵢ x: x [..., in], gate [..., N] -> [..., out]."""
    flat, open_ = x.reshape(-1, x.shape[-1]), gate.reshape(-1, gate.shape[-1])
    total = flat.new_zeros(len(flat), factors["B"].shape[1])
    for i, (a, b) in enumerate(zip(factors["A"], factors["B"], strict=True)):
        (mine,) = open_[:, i].nonzero(as_tuple=True)
        term = open_[mine, i, None] * ((flat[mine] @ a.T) @ b.T)
        total = total.index_add(0, mine, term.to(total.dtype))
    return config.scaling * total.reshape(*x.shape[:-1], -1)


def from_lora(w: A, a: A, b: A) -> None:
    """None: of how many experts, only a config says; see `from_delta`."""


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,
    lora: tuple[A, A],
    config: AdapterConfig,
) -> dict[str, A]:
    """Every expert the LoRA itself: its gates sum to 1, so that the router, N(0, 0.02²), may be any."""
    n, seed = experts(config), config.extra.get("seed", 0)
    assert isinstance(seed, int)
    chance = np.random.default_rng(seed).standard_normal((n, delta.shape[1]), dtype=np.float32)
    # numpy's stack, or torch's
    stack: Any = sys.modules[type(delta).__module__].stack
    a, b = (stack([factor] * n) for factor in lora)
    return {"A": a, "B": b, "router": alike(delta, np.float32(0.02) * chance)}


def low_rank(factors: Mapping[str, A], config: AdapterConfig) -> None:
    """None: the gates depend on the token."""


def mixture(factors: Mapping[str, A], config: AdapterConfig, gate: A) -> tuple[A, A]:
    """A [N r, in] and B [out, N r], scaling folded in, of fixed gates [N]: exact for a constant router."""
    # numpy's concatenate, or torch's
    join: Any = sys.modules[type(gate).__module__].concatenate
    a, b = factors["A"], factors["B"]
    weighed = [config.scaling * gate[i] * b[i] for i in range(len(a))]
    return a.reshape(-1, a.shape[-1]), join(weighed, -1)
