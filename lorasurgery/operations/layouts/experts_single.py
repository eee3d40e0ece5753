"""A stack of experts as modules of one expert each: exact, gate and up sharing A."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.layouts import EXPERTS, TURNED_EXPERTS
from lorasurgery.model import Model
from lorasurgery.naming import Names
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.operations.layouts.experts import (
    count,
    is_stacked,
    kind,
    names_of,
    needed,
    upright,
)
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.tensors import TensorInfo


class _Last:
    """The one stack whose experts are being read: each asks for it, one after the other."""

    def __init__(self) -> None:
        self._held: tuple[Site, Mapping[str, Array]] | None = None

    def of(self, site: Site) -> Mapping[str, Array]:
        """A [experts, r, in] and B [experts, out, r]."""
        held = self._held
        if held is None or held[0] is not site:
            factors = {n: f.reshape(-1, *f.shape[-2:]) for n, f in site.load().items()}
            self._held = held = (site, factors)
        return held[1]


# whose modules have other names one by one than stacked
_MIXTRAL = ("mixtral", "minimax", "minimax_m2")


def single(adapter: Adapter, model: Model | None) -> Relaid:
    """Every stack as its experts. Raises MatchError without a base, and where the model has no such modules."""
    stacks = [site for site in adapter.sites if is_stacked(site)]
    if not stacks:
        raise MatchError(
            f"{adapter.path}: none of its sites is a stack of experts. Leave --experts out."
        )
    model = needed(adapter, model)
    name = kind(model.config)
    if name in TURNED_EXPERTS:
        raise MatchError(
            f"{adapter.path}: {name} has its experts stacked alone, so that there are no modules for one of "
            "them. Leave --experts out."
        )
    straight, names = upright(adapter, model), names_of(adapter, model)
    experts, last = count(adapter, model), _Last()
    found: list[tuple[Site, Site]] = []
    for old, site in zip(adapter.sites, straight.sites, strict=True):
        of = (
            _experts_of(adapter, site, experts, (model, names), last)
            if is_stacked(site)
            else [site]
        )
        found += [(one, old) for one in of]
    note = f"{len(stacks)} stacks are written expert by expert; gate and up share A"
    made = replace(adapter, sites=tuple(new for new, _ in found))
    return Relaid(made, tuple(old for _, old in found), (note,))


def _experts_of(
    adapter: Adapter, site: Site, experts: int, base: tuple[Model, Names], last: _Last
) -> list[Site]:
    if site.config.variant != "lora" or site.parameter not in EXPERTS or site.experts != experts:
        raise MatchError(
            f"{adapter.path}: {name_of(site)} is a {site.config.variant} of a stack of {site.experts} experts, "
            f"and what can be taken apart is a lora of the base's {experts}. Leave --experts out."
        )
    modules = _modules(site, experts, *base)
    each = len(modules) // experts
    step = site.factors["B"].shape[-2] // each
    return [
        _slice(site, module, (i // each, i % each * step, step), last)
        for i, module in enumerate(modules)
    ]


def _modules(site: Site, experts: int, model: Model, names: Names) -> list[str]:
    """Of all experts, each with all its parts: by the base's own tensors, or else by its kind."""
    parts = names.parts(name_of(site), site.size[0] or 0, experts)
    if parts and parts[0].expert is not None:
        return [part.tensor.removesuffix(".weight") for part in parts]
    mixtral = kind(model.config) in _MIXTRAL
    of = EXPERTS[site.parameter][0 if mixtral else 1]
    owner = site.module.replace(".mlp.", ".block_sparse_moe.") if mixtral else site.module
    return [f"{owner}.{expert}.{name}" for expert in range(experts) for name in of]


def _slice(site: Site, module: str, where: tuple[int, int, int], last: _Last) -> Site:
    """`where`: which expert, its first row of B, and how many."""
    expert, first, step = where
    a, b = (site.factors[name].shape for name in "AB")
    facts = {
        "A": TensorInfo("A", "F32", a[-2:]),
        "B": TensorInfo("B", "F32", (step, b[-1])),
    }

    def load() -> dict[str, Array]:
        held = last.of(site)
        return {
            "A": np.ascontiguousarray(held["A"][expert]),
            "B": np.ascontiguousarray(held["B"][expert, first : first + step]),
        }

    return replace(
        site, module=module, parameter="weight", layout="linear", factors=facts, load=load,
        sides=(None, None),
    )  # fmt: skip
