"""Factors at step 0, the same whatever other modules are adapted and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import blake3

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Variant
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Factors, Place

if TYPE_CHECKING:
    from torch import Generator

# variants that do not go with an embedding, and why
LINEAR_ALONE = {
    "adalora": "and AdaLoRA's files hold linear layers alone",
    "dora": "which DoRA's files in PEFT's form norm along the other axis",
    "moral": "and a router chooses by what a linear layer sees",
    "vera": "and VeRA's projections are of linear layers",
}


def each(places: Sequence[Place], config: AdapterConfig, seed: int) -> Mapping[str, Factors]:
    """The variant's own `init` of every place, in float32 or the base's wider dtype. As `check` raises."""
    from lorasurgery.training.adapted import dense

    check(places, config.variant)
    variant = cast(Variant, plugins.load("adapters", config.variant))
    found = {}
    for place in places:
        w = dense(place.base)
        made = variant.init(w, config, generator(seed, place.module))
        found[place.module] = {name: f.to(w.device, w.dtype) for name, f in made.items()}
    return found


def check(places: Sequence[Place], variant: str) -> None:
    """Raises UsageError for an embedding where the variant has linear layers alone."""
    from torch import nn

    for place in places:
        if variant in LINEAR_ALONE and isinstance(place.base, nn.Embedding):
            raise UsageError(
                f"--target-modules: {place.module} is an embedding, {LINEAR_ALONE[variant]}. Leave it out."
            )


def generator(seed: int, module: str) -> Generator:
    """Its stream depends on the seed and the module's name alone."""
    import torch

    digest = blake3.blake3(f"{seed} {module}".encode()).digest(8)
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
