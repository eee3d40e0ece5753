"""VeRA: two vectors for each module, between projections that are drawn once and shared by all of them.

Kopiczko et al. 2023, arXiv 2310.11454, §3. The projections are drawn from --projection-key, by torch's generator
on the CPU: PEFT draws the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Factors, Place, Wanted
from lorasurgery.training.methods.lora import groups, hooks

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "vera"
TRAINED = ("b", "d")
RATE = 1e-2
RANK = 256
D_START = 0.1


@dataclass(frozen=True, slots=True)
class Options:
    """What VeRA alone has."""

    projection_key: int = field(default=0, metadata={"help": "The seed of the shared projections."})
    save_projection: bool = field(
        default=True, metadata={"help": "Keep the projections in the file, not their seed alone."}
    )


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError for an alpha, which VeRA has not."""
    if wanted.alpha is not None or wanted.rank_stabilized:
        raise UsageError("--alpha: VeRA is scaled by its vectors alone. Take it away.")
    rank = RANK if wanted.rank is None else wanted.rank
    extra = {
        "projection_prng_key": options.projection_key,
        "save_projection": options.save_projection,
    }
    return AdapterConfig(VARIANT, rank, float(rank), extra=extra)


def start(
    places: Sequence[Place], config: AdapterConfig, options: Any, seed: int
) -> Mapping[str, Factors]:
    """Views of one pair of projections; d = 0.1, b = 0. The seed plays no part."""
    import torch

    from lorasurgery.adapters.vera import projections
    from lorasurgery.training.adapted import dense
    from lorasurgery.training.start import check

    check(places, VARIANT)
    widest_out = max(place.sides[0] for place in places)
    widest_in = max(place.sides[1] for place in places)
    rng = torch.Generator().manual_seed(options.projection_key)
    w = dense(places[0].base)
    a, b = (m.to(w.device, w.dtype) for m in projections(config.rank, widest_in, widest_out, rng))
    found = {}
    for place in places:
        out, in_ = place.sides
        found[place.module] = {
            "A": a[:, :in_],
            "B": b[:out],
            "d": torch.full((config.rank,), D_START, dtype=w.dtype, device=w.device),
            "b": torch.zeros(out, dtype=w.dtype, device=w.device),
        }
    return found
