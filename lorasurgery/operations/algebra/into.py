"""A change as the nearest factors of a variant, and how far from it they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from typing import cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Site, Variant
from lorasurgery.arrays import Array
from lorasurgery.errors import UsageError
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.tensors import TensorInfo

# of what a variant is asked with: large enough for a product of rank r² to be of low rank
_OUT, _IN, _RANK = 96, 80, 3
_PROJECTIONS = 256  # VeRA's rank, where nobody says another


@dataclass(frozen=True, slots=True)
class Form:
    """A variant, the rank that its own factors are to have, and what else its config says."""

    variant: str
    rank: int | None = None
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def module(self) -> Variant:
        return cast(Variant, plugins.load("adapters", self.variant))

    @property
    def bound(self) -> bool:
        """Whether its factors belong to one base, whose hash is in extra['base']."""
        return bool(getattr(self.module, "BOUND", False))

    def with_extra(self, **more: object) -> Form:
        return replace(self, extra={**self.extra, **more})


class Takes(Enum):
    """What a variant makes of a LoRA."""

    EXACTLY, NEARLY, NOTHING = "exact", "nearest", "no factors do"


def takes(variant: str) -> Takes:
    """Asked with a small one that is made up for it."""
    rng, form = np.random.default_rng(0), Form(variant, _RANK)
    w, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((_OUT, _IN), (_RANK, _IN), (_OUT, _RANK))
    )
    if exactly(form, w, (a, b)) is not None:
        return Takes.EXACTLY
    found = nearest_of(form, w, b @ a, (a, b))
    if found is None:
        return Takes.NOTHING
    # what a router adds up is what all of its experts are
    return Takes.NEARLY if found.error2 > 1e-6 * square(b @ a) else Takes.EXACTLY


@dataclass(frozen=True, slots=True)
class Held:
    """Factors, their config, and ||ΔW - what they do||²."""

    factors: Mapping[str, Array]
    config: AdapterConfig
    error2: float

    def at(self, site: Site, size: tuple[int, int]) -> Site:
        """The site with these factors, which change a W of this size."""
        infos = {name: TensorInfo(name, "F32", f.shape) for name, f in self.factors.items()}
        sides = (None, None) if {"A", "B"} <= infos.keys() else size
        factors = self.factors
        return replace(
            site, config=self.config, factors=infos, load=lambda: factors, sides=sides,
        )  # fmt: skip


def exactly(form: Form, w: Array, lora: tuple[Array, Array]) -> Held | None:
    """Factors that change W by B A; None if none do."""
    factors = form.module.from_lora(w, *lora)
    return None if factors is None else _held(form, factors, len(lora[0]))


def nearest_of(form: Form, w: Array, delta: Array, lora: tuple[Array, Array]) -> Held | None:
    """Factors that change W by nearly ΔW, of which B A is the nearest of a rank; None if none are near."""
    rank = form.rank or len(lora[0])
    config = AdapterConfig(form.variant, rank, float(rank), extra=form.extra)
    factors = form.module.from_delta(w, delta, lora, config)
    held = exactly(form, w, lora) if factors is None else _held(form, factors, rank)
    if held is None:
        return None
    # what a router does is what each of its experts does, which are the LoRA
    routed = getattr(form.module, "ROUTED", False)
    done = lora[1] @ lora[0] if routed else form.module.delta(w, held.factors, held.config)
    return replace(held, error2=square(delta - done))


def _held(form: Form, factors: Mapping[str, Array], rank: int) -> Held:
    held = {name: np.ascontiguousarray(f, np.float32) for name, f in factors.items()}
    # the factors are those of the widest module that is left
    extra = {k: v for k, v in form.extra.items() if k != "projections"}
    return Held(held, AdapterConfig(form.variant, rank, float(rank), extra=extra), 0.0)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the command line says of a variant beside its name."""

    rank: int | None = None
    experts: int | None = None
    top_k: int | None = None
    seed: int | None = None

    def form(self, variant: str, sizes: tuple[int, int]) -> Form:
        """`sizes`: the most outputs and inputs of any module. Raises UsageError for what means nothing."""
        if variant != "moral" and (self.experts or self.top_k):
            raise UsageError(f"--to {variant}: --experts and --top-k are of moral. Take them away.")
        if variant not in ("moral", "vera") and self.seed is not None:
            raise UsageError(f"--to {variant}: has nothing that --seed draws. Take it away.")
        seed = self.seed or 0
        if variant == "moral":
            if not self.experts:
                raise UsageError("--to moral: needs to know of how many experts. Pass --experts N.")
            top = min(self.top_k or 2, self.experts)
            return Form(variant, self.rank, {"experts": self.experts, "top_k": top, "seed": seed})
        if variant != "vera":
            return Form(variant, self.rank)
        rank = self.rank or _PROJECTIONS

        @cache
        def drawn() -> tuple[Array, Array]:
            import torch

            chance = torch.Generator().manual_seed(seed)
            a, b = plugins.load("adapters", "vera").projections(rank, sizes[1], sizes[0], chance)
            return a.numpy(), b.numpy()

        return Form(variant, rank, {"projections": drawn, "projection_prng_key": seed})
