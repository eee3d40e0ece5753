"""Experts as a runtime has them: one by one or stacked, and with zeros for those that it does not want to miss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.errors import MatchError
from lorasurgery.layouts import EXPERTS
from lorasurgery.model import Model
from lorasurgery.operations.layouts.experts import (
    ONE,
    count,
    is_one,
    is_stacked,
    said_count,
    upright,
)
from lorasurgery.operations.layouts.experts_single import single
from lorasurgery.operations.layouts.experts_stacked import stacked
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.operations.runtimes.claims import Runtime
from lorasurgery.tensors import TensorInfo


def fitted_experts(adapter: Adapter, name: str, known: Runtime, model: Model | None) -> Relaid:
    """Raises MatchError where the base would tell which layout is read, and is not given."""
    stacks = any(map(is_stacked, adapter.sites))
    ones = any(map(is_one, adapter.sites))
    same = Relaid(adapter, adapter.sites, ())
    if not known.experts or not (stacks or ones):
        return same
    if model is None:
        raise MatchError(
            f"{adapter.path}: experts are adapted, and {name} reads them one by one or stacked, as the model "
            "is. Give the base."
        )
    if known.takes_stacks(model.config):
        made = same.then(lambda one: stacked(one, model)) if ones else same
        straight = upright(made.adapter, model)
        return _filled(replace(made, adapter=straight), _other_stack(straight))
    made = same.then(lambda one: single(one, model)) if stacks else same
    return _filled(made, _missing(made.adapter, count(adapter, model)))


def some_missing(adapter: Adapter, model: Model | None) -> tuple[str, ...]:
    """Modules that have no factors, of experts of which others have; without the model as many as are seen."""
    seen = [int(m["expert"]) for s in adapter.sites if is_one(s) and (m := ONE.fullmatch(s.module))]
    if not seen:
        return ()
    said = said_count(model.config) if model else None
    return tuple(_missing(adapter, said or max(seen) + 1))


def _filled(made: Relaid, missing: Mapping[str, Site]) -> Relaid:
    """The adapter with sites that do nothing, each with the one that it was made like."""
    if not missing:
        return made
    by = {id(new): old for new, old in zip(made.adapter.sites, made.origins, strict=True)}
    zeros = [_nothing(name, like) for name, like in missing.items()]
    sites = (*made.adapter.sites, *zeros)
    origins = (*made.origins, *(by[id(like)] for like in missing.values()))
    note = f"{len(zeros)} experts' modules that were not adapted get factors of zeros"
    return Relaid(replace(made.adapter, sites=sites), origins, (*made.notes, note))


def _missing(adapter: Adapter, experts: int) -> dict[str, Site]:
    """Module -> a site of the same experts, whose sizes tell its own."""
    owners: dict[tuple[str, tuple[str, ...]], Site] = {}
    for site in adapter.sites:
        match = ONE.fullmatch(site.module)
        naming = _naming(match["part"]) if match else None
        if match and naming:
            owners.setdefault((match["owner"], naming), site)
    there = {site.module for site in adapter.sites}
    return {
        name: like
        for (owner, naming), like in owners.items()
        for expert in range(experts)
        for part in naming
        if (name := f"{owner}.{expert}.{part}") not in there
    }


def _naming(part: str) -> tuple[str, ...] | None:
    """All names that one expert's matrices have, in the naming that has this one."""
    for leading, last in zip(EXPERTS["gate_up_proj"], EXPERTS["down_proj"], strict=True):
        if part in (*leading, *last):
            return (*leading, *last)
    return None


def _other_stack(adapter: Adapter) -> dict[str, Site]:
    """Of stacks of which either what leads in or what leads out is adapted, the other."""
    found = {f"{s.module}.{s.parameter}": s for s in adapter.sites if is_stacked(s)}
    return {
        name: site
        for site in found.values()
        for parameter in EXPERTS
        if (name := f"{site.module}.{parameter}") not in found
    }


def _nothing(name: str, like: Site) -> Site:
    """Factors of zeros; what leads out of experts has the sizes of what leads in, the other way round."""
    module, _, last = name.rpartition(".")
    leads_out = ("w2", "down_proj")
    out, in_ = like.factors["B"].shape[-2], like.factors["A"].shape[-1]
    if is_stacked(like):
        own = (in_, out // 2) if last in leads_out else (2 * in_, out)
        like = replace(like, module=module, parameter=last)
    else:
        as_it = (last in leads_out) == like.module.endswith(leads_out)
        own = (out, in_) if as_it else (in_, out)
        like = replace(like, module=name)
    before = like.factors["A"].shape[:-2]
    shapes = {"A": (*before, 1, own[1]), "B": (*before, own[0], 1)}
    held = {factor: np.zeros(shape, np.float32) for factor, shape in shapes.items()}
    facts = {factor: TensorInfo(factor, "F32", shape) for factor, shape in shapes.items()}
    config = AdapterConfig("lora", 1, 1.0)
    return replace(like, config=config, factors=facts, load=lambda: held, sides=(None, None))
