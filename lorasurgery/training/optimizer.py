"""What a file in optimizers/ offers, and how groups are handed to torch and scheduled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorasurgery import plugins
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Group

if TYPE_CHECKING:
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Settings:
    """Of every optimizer, as far as it has them."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    budget: int | None = None  # bytes of state that may be in memory at once


class Kind(Protocol):
    """A module in optimizers/; BUDGETED says that it heeds Settings.budget."""

    def make(self, groups: Sequence[Group], settings: Settings) -> Optimizer:
        """State is made at the first step, and comes and goes by state_dict and load_state_dict."""
        ...


def make(name: str, groups: Sequence[Group], settings: Settings) -> Optimizer:
    """By the name that users type. Raises UnknownNameError; UsageError for a budget that means nothing to it."""
    kind = plugins.load("training.optimizers", name.replace("-", "_"))
    if settings.budget is not None and not getattr(kind, "BUDGETED", False):
        raise UsageError(
            f"--state-budget: means nothing to --optimizer {name}, whose state is in memory as a whole. Take "
            "paged-adamw, or leave it out."
        )
    return cast(Kind, kind).make(groups, settings)


def as_groups(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """torch's form; `rate` keeps what the schedule multiplies."""
    return [
        {
            "params": [member.parameter for member in group.members],
            "name": group.name,
            "lr": group.rate,
            "rate": group.rate,
            "weight_decay": group.decay,
        }
        for group in groups
    ]


def set_rates(optimizer: Optimizer, factor: float) -> dict[str, float]:
    """Multiply each group's rate; returns them by group."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * factor
    return {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}
