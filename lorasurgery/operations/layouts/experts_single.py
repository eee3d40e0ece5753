"""A stack of experts as modules of one expert each: exact, gate and up sharing A."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.layouts import EXPERTS, TURNED_EXPERTS
from lorasurgery.model import Model
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.operations.layouts.experts import (
    count,
    is_stacked,
    kind,
    needed,
    stored_parts,
    upright,
)
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.tensors import TensorInfo

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
    straight = upright(adapter, model)
    found: list[tuple[Site, Site]] = []
    for old, site in zip(adapter.sites, straight.sites, strict=True):
        of = _experts_of(adapter, site, model) if is_stacked(site) else [site]
        found += [(one, old) for one in of]
    note = f"{len(stacks)} stacks are written expert by expert; gate and up share A"
    made = replace(adapter, sites=tuple(new for new, _ in found))
    return Relaid(made, tuple(old for _, old in found), (note,))


def _experts_of(adapter: Adapter, site: Site, model: Model) -> list[Site]:
    if site.config.variant != "lora" or site.parameter not in EXPERTS:
        raise MatchError(
            f"{adapter.path}: {name_of(site)} is a stack of experts that nobody has written one by one. Leave "
            "--experts out."
        )
    found = []
    for expert in range(count(adapter, model)):
        modules = _modules(site, expert, model)
        step = site.factors["B"].shape[-2] // len(modules)
        for i, module in enumerate(modules):
            found.append(_slice(site, module, expert, slice(i * step, (i + 1) * step)))
    return found


def _modules(site: Site, expert: int, model: Model) -> list[str]:
    """By the base's own tensors, or else by its kind."""
    if (stored := stored_parts(site, expert, model)) is not None:
        return stored
    mixtral = kind(model.config) in _MIXTRAL
    names = EXPERTS[site.parameter][0 if mixtral else 1]
    owner = site.module.replace(".mlp.", ".block_sparse_moe.") if mixtral else site.module
    return [f"{owner}.{expert}.{name}" for name in names]


def _slice(site: Site, module: str, expert: int, rows: slice) -> Site:
    a, b = (site.factors[name].shape for name in "AB")
    facts = {
        "A": TensorInfo("A", "F32", a[-2:]),
        "B": TensorInfo("B", "F32", (rows.stop - rows.start, b[-1])),
    }

    def load() -> dict[str, Array]:
        held = {
            name: factor.reshape(-1, *factor.shape[-2:]) for name, factor in site.load().items()
        }
        return {
            "A": np.ascontiguousarray(held["A"][expert]),
            "B": np.ascontiguousarray(held["B"][expert, rows]),
        }

    return replace(
        site, module=module, parameter="weight", layout="linear", factors=facts, load=load,
        sides=(None, None),
    )  # fmt: skip
