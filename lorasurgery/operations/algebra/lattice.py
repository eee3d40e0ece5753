"""What becomes of one variant as another: told by the variants themselves, of small factors made up for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Variant
from lorasurgery.operations.algebra.direct import way
from lorasurgery.operations.algebra.into import Takes, takes

# W is large enough for a product of rank r² to be of low rank
_OUT, _IN, _RANK = 96, 80, 3
_NAMES = {_RANK: "exact", 2 * _RANK: "exact at rank 2r", _RANK**2: "exact at rank r²"}


@dataclass(frozen=True, slots=True)
class Way:
    """From a variant to LoRA, and from LoRA to it; and which other variants become it exactly without."""

    variant: str
    to_lora: str
    from_lora: str
    straight: tuple[str, ...]


def lattice() -> list[Way]:
    """Every variant; from one to another leads through LoRA, or straight."""
    return [_way(name) for name in plugins.names("adapters")]


def _way(name: str) -> Way:
    variant = cast(Variant, plugins.load("adapters", name))
    base = "" if variant.LINEAR_IN_W else ", of the base"
    rank = _low_rank(name, variant)
    nearest = f"nearest of rank k{base}"
    if hasattr(variant, "low_rank_on"):
        nearest = f"exact at rank 2r{base}, or with --init"
    if getattr(variant, "ROUTED", False):
        nearest = "static mixture at rank N r, or an expert (--mixture)"
    return Way(
        name,
        _NAMES.get(rank, f"exact at rank {rank / _RANK:g}r for [{_OUT}, {_IN}]")
        if rank
        else nearest,
        _from_lora(name, base or (", of the base" if getattr(variant, "BOUND", False) else "")),
        tuple(other for other in plugins.names("adapters") if way(other, name)),
    )


def _low_rank(name: str, variant: Variant) -> int:
    """The rank that a variant of rank 3 has as a LoRA; 0 if it is none."""
    config, rng = AdapterConfig(name, _RANK, float(_RANK)), np.random.default_rng(0)
    factors = {
        factor: rng.standard_normal(shape).astype(np.float32)
        for factor, shape in variant.shapes(_OUT, _IN, config).items()
    }
    form = variant.low_rank(factors, config)
    return 0 if form is None else len(form[0])


def _from_lora(name: str, base: str) -> str:
    found = takes(name)
    return found.value if found is Takes.NOTHING else f"{found.value}{base}"
