"""kohya's joined names as the paths that a model has: `down_blocks_0_to_q` is `down_blocks.0.to_q` there."""

from __future__ import annotations

from dataclasses import replace

from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import MatchError
from lorasurgery.model import Model
from lorasurgery.naming import Names
from lorasurgery.operations.layouts.flux import as_diffusers, is_flux
from lorasurgery.operations.layouts.relaid import Relaid


def dotted(adapter: Adapter, model: Model | None, *, parts: bool) -> Relaid:
    """The same sites by the model's names, below their part of the pipeline if `parts` is true.

    Flux's own names are diffusers' by a table; what is fused there is split.

    Raises MatchError without a model, and for a module that no tensor of it is.
    """
    if parts and is_flux(adapter):
        return as_diffusers(adapter)
    if model is None:
        raise MatchError(
            f"{adapter.path}: the names of its modules have _ for ., which only the model's own names can "
            "undo. Give the base."
        )
    live = [f"{site.module}.{site.parameter}" for site in adapter.sites]
    names = Names(model.weights, live)
    sites: list[Site] = []
    for name, site in zip(live, adapter.sites, strict=True):
        stored = names.find(name)
        if stored is None:
            raise MatchError(
                f"{adapter.path}: {site.module} is no module of {model.path}. {names.nearest(name)}"
            )
        path = stored.rpartition(".")[0]
        part, _, rest = site.module.partition(".")
        sites.append(replace(site, module=f"{part}.{path}" if parts and rest else path))
    made = replace(adapter, sites=tuple(sites), dialect="peft", settings={})
    return Relaid(made, adapter.sites, ())
