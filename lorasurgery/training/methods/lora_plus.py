"""LoRA+: LoRA with B's learning rate a multiple of A's.

Hayou et al. 2024, arXiv 2402.12354, §4. Magnitudes and heads keep A's rate; --compat peft gives every vector
B's, as PEFT's create_loraplus_optimizer does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Group, Hooks, Named, Rates, Wanted
from lorasurgery.training.methods import lora
from lorasurgery.training.methods.lora import VARIANT, config_of, start

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

TRAINED = ("A", "B", "m")
# of A: B's is RATIO times as much
RATE = 2e-4


@dataclass(frozen=True, slots=True)
class Options:
    """What LoRA+ alone has."""

    ratio: float = field(default=16.0, metadata={"help": "B's learning rate over A's."})
    embedding_rate: float = field(
        default=1e-6, metadata={"help": "The learning rate of embeddings' factors."}
    )
    compat: Literal["none", "peft"] = field(
        default="none", metadata={"help": "peft: vectors have B's rate too."}
    )
    dora: bool = field(default=False, metadata={"help": "DoRA's magnitudes as well."})


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError for a ratio that is no positive number."""
    if not 0 < options.ratio < float("inf"):
        raise UsageError(f"--ratio {options.ratio:g}: is no positive number. 16 is the paper's.")
    return config_of("dora" if options.dora else VARIANT, wanted)


def groups(named: Sequence[Named], rates: Rates, options: Any) -> list[Group]:
    """LoRA's groups, B's and embeddings' at their own rates."""
    b_rate = rates.rate * options.ratio
    special = {"B": b_rate, "embedding": options.embedding_rate}
    found = []
    for group in lora.groups(named, rates, options):
        raised = tuple(n for n in group.members if options.compat == "peft" and _is_vector(n))
        rest = tuple(n for n in group.members if n not in raised)
        if raised:
            found.append(replace(group, name=f"{group.name}, as B", members=raised, rate=b_rate))
        if rest:
            found.append(replace(group, members=rest, rate=special.get(group.name, group.rate)))
    return found


def _is_vector(named: Named) -> bool:
    """What has one dimension in PEFT: it keeps magnitudes flat."""
    return named.role == "magnitude" or named.parameter.ndim == 1


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """Nothing happens beside the steps; a ratio that turns the method around is told."""
    return Slower(layers) if options.ratio < 1 else Hooks(layers)


class Slower(Hooks):
    """B learns more slowly than A."""

    def notes(self) -> Sequence[str]:
        return ["--ratio: is below 1, so that B learns more slowly than A: LoRA+ is the opposite."]
