"""LoRA: A and B of each module, one learning rate; A uniform in ±1/√in, B zero.

Hu et al. 2021, arXiv 2106.09685, §4.1. The other methods are told by how they differ from this one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.training.method import Factors, Group, Hooks, Named, Place, Rates, Wanted

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

VARIANT = "lora"
TRAINED: tuple[str, ...] = ("A", "B")
RATE = 1e-3
RANK = 8
# what stays small by itself, or is no direction in W's space, is not drawn to zero
UNDECAYED = ("magnitude", "vector")


@dataclass(frozen=True, slots=True)
class Options:
    """None of its own."""


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Alpha is twice the rank where it is not said."""
    return config_of(VARIANT, wanted)


def config_of(variant: str, wanted: Wanted) -> AdapterConfig:
    """Rank and alpha as they were asked for, or 8 and twice the rank."""
    rank = RANK if wanted.rank is None else wanted.rank
    alpha = 2.0 * rank if wanted.alpha is None else wanted.alpha
    return AdapterConfig(variant, rank, float(alpha), wanted.rank_stabilized)


def start(
    places: Sequence[Place], config: AdapterConfig, options: Any, seed: int
) -> Mapping[str, Factors]:
    """Each place by the variant's own `init`, from a generator that belongs to its name."""
    from lorasurgery.training.start import each

    return each(places, config, seed)


def groups(named: Sequence[Named], rates: Rates, options: Any) -> list[Group]:
    """By role, all at one rate."""
    roles = dict.fromkeys(n.role for n in named)
    return [
        Group(
            role,
            tuple(n for n in named if n.role == role),
            rates.rate,
            0.0 if role in UNDECAYED else rates.decay,
        )
        for role in roles
    ]


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """Nothing happens beside the steps."""
    return Hooks(layers)
