"""Factors at step 0, the same whatever other modules are adapted and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import blake3

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Variant
from lorasurgery.training.method import Factors, Place

if TYPE_CHECKING:
    from torch import Generator


def each(places: Sequence[Place], config: AdapterConfig, seed: int) -> Mapping[str, Factors]:
    """The variant's own `init` of every place, in float32 or the base's wider dtype."""
    from lorasurgery.training.adapted import dense

    variant = cast(Variant, plugins.load("adapters", config.variant))
    found = {}
    for place in places:
        w = dense(place.base)
        made = variant.init(w, config, generator(seed, place.module))
        found[place.module] = {name: f.to(w.device, w.dtype) for name, f in made.items()}
    return found


def generator(seed: int, module: str) -> Generator:
    """Its stream depends on the seed and the module's name alone."""
    import torch

    digest = blake3.blake3(f"{seed} {module}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
