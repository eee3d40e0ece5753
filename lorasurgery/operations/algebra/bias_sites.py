"""LoRA of biases as what is added to them: no layout has a place for factors of a vector."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter
from lorasurgery.operations.algebra.made import low_rank, name_of
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def biases_added(adapter: Adapter) -> Adapter:
    """The adapter, in which vectors are added where a LoRA changed a bias."""
    of = {
        name_of(site): site
        for site in adapter.sites
        if site.parameter == "bias" and site.config.variant == "lora"
    }
    if not of:
        return adapter

    def load(name: str) -> Array:
        if name not in of:
            return adapter.load_added(name)
        a, b = low_rank(adapter, of[name])
        vector: Array = (b @ a).reshape(-1)
        return vector

    infos = {n: TensorInfo(n, "F32", (s.factors["B"].shape[-2],)) for n, s in of.items()}
    sites = tuple(site for site in adapter.sites if name_of(site) not in of)
    return replace(adapter, sites=sites, added={**adapter.added, **infos}, load_added=load)
