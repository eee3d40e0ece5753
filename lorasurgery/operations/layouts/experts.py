"""Experts one by one <-> stacked: how transformers 4 and vLLM name them, and the parameters of transformers 5.

One by one: `experts.3.gate_proj`, or Mixtral's `experts.3.w1` (gate), `w3` (up) and `w2` (down). Stacked:
`experts.gate_up_proj`, whose rows are gate's and then up's, and `experts.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.layouts import EXPERTS, TURNED_EXPERTS
from lorasurgery.model import Model
from lorasurgery.naming import Names
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.operations.layouts.fused_rows import text_of
from lorasurgery.tensors import TensorInfo

ONE = re.compile(r"(?P<owner>.+\.experts)\.(?P<expert>\d+)\.(?P<part>\w+)")
# parameter -> its parts in either naming
PARTS = {p: tuple(dict.fromkeys(n for names in of for n in names)) for p, of in EXPERTS.items()}
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def is_stacked(site: Site) -> bool:
    """Whether it is a parameter that holds all experts."""
    return site.layout == "experts" or (site.layout == "parameter" and site.parameter in EXPERTS)


def is_one(site: Site) -> bool:
    """Whether it is a matrix of one expert."""
    match = ONE.fullmatch(site.module)
    return bool(match) and any(match["part"] in parts for parts in PARTS.values() if match)


def upright(adapter: Adapter, model: Model) -> Adapter:
    """A on the side of what goes in, as PEFT has it since it asks models whether theirs are turned.

    Raises MatchError for factors of other sizes than the base's experts.
    """
    names = names_of(adapter, model)
    sites = tuple(
        _swapped(site) if is_stacked(site) and _turned(adapter, site, model, names) else site
        for site in adapter.sites
    )
    return replace(adapter, sites=sites)


def names_of(adapter: Adapter, model: Model) -> Names:
    """How the adapter's stacks are found in the base."""
    return Names(model.weights, [name_of(site) for site in adapter.sites if is_stacked(site)])


def _turned(adapter: Adapter, site: Site, model: Model, names: Names) -> bool:
    """Whether the factors are of the transpose; where W is square, they are taken for what they should be."""
    size, stored = site.size, _size(site, model, names)
    if stored is None:
        raise MatchError(
            f"{adapter.path}: {name_of(site)} is adapted, but {model.path} has no such experts. Check --base."
        )
    if size not in (stored, stored[::-1]):
        raise MatchError(
            f"{adapter.path}: {name_of(site)} is of experts of {list(size)}, and {model.path} has them of "
            f"{list(stored)}. Check --base."
        )
    return size != stored


def _size(site: Site, model: Model, names: Names) -> tuple[int, int] | None:
    """What goes out of one expert's matrix and what goes in, by the base's own tensors."""
    # of the first expert alone; its rows are counted here, and any number that can be dealt out does
    parts = names.parts(name_of(site), len(PARTS[site.parameter]), 1)
    shapes = [model.weights.info(part.tensor).shape for part in parts]
    if not parts:
        return None
    if parts[0].expert is None:
        out, in_ = shapes[0][-2:]
        return (in_, out) if kind(model.config) in TURNED_EXPERTS else (out, in_)
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _swapped(site: Site) -> Site:
    """The same change of W, from factors of its transpose: (B A)ᵀ = Aᵀ Bᵀ."""

    def turned(info: TensorInfo) -> tuple[int, ...]:
        return (*info.shape[:-2], info.shape[-1], info.shape[-2])

    facts = {
        "A": TensorInfo("A", "F32", turned(site.factors["B"])),
        "B": TensorInfo("B", "F32", turned(site.factors["A"])),
    }

    def load() -> dict[str, Array]:
        held = site.load()
        return {
            "A": np.ascontiguousarray(held["B"].swapaxes(-1, -2)),
            "B": np.ascontiguousarray(held["A"].swapaxes(-1, -2)),
        }

    return replace(site, factors=facts, load=load)


def needed(adapter: Adapter, model: Model | None) -> Model:
    """Raises MatchError without a base."""
    if model is None:
        raise MatchError(
            f"{adapter.path}: how many experts there are, and what they are called, only the base tells. Pass "
            "--base DIR."
        )
    return model


def count(adapter: Adapter, model: Model) -> int:
    """How many experts a layer has. Raises MatchError where the config does not say."""
    found = said_count(model.config)
    if found is None:
        raise MatchError(
            f"{adapter.path}: {model.path}'s config.json does not say how many experts it has "
            f"({', '.join(_COUNTS)}). Check --base."
        )
    return found


def said_count(config: Mapping[str, Any]) -> int | None:
    """How many experts a layer has, as config.json says."""
    text = text_of(config)
    found = next((text[key] for key in _COUNTS if text.get(key)), None)
    return None if found is None else int(found)


def kind(config: Mapping[str, Any]) -> str:
    """The model type, of a pipeline that of its language model."""
    return str(text_of(config).get("model_type", ""))
