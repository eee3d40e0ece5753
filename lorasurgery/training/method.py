"""What a file in methods/ offers: how one method of training differs from the others, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UnknownNameError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from lorasurgery.training.adapted import Adapted
    from lorasurgery.training.batches import Batch
    from lorasurgery.training.ranks import Ranks

Factors = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of every method; None leaves it to the method."""

    rank: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    rank_stabilized: bool = False
    seed: int = 0
    steps: int = 0  # of the whole run


@dataclass(frozen=True, slots=True)
class Place:
    """A module that is to be adapted."""

    module: str
    base: nn.Module

    @property
    def sides(self) -> tuple[int, int]:
        """W's out and in."""
        from lorasurgery.training.adapted import sides

        return sides(self.base)


@dataclass(frozen=True, slots=True)
class Named:
    """A trained parameter: `role` is A, B, embedding, magnitude, vector or head."""

    name: str
    role: str
    parameter: nn.Parameter


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that one rate and one weight decay are for; the schedule multiplies the rate."""

    name: str
    members: tuple[Named, ...]
    rate: float
    decay: float


@dataclass(frozen=True, slots=True)
class Rates:
    """What the groups are made of."""

    rate: float
    decay: float = 0.0


def _alone() -> Ranks:
    from lorasurgery.training.ranks import ALONE  # loads torch

    return ALONE


@dataclass(slots=True)
class Hooks:
    """What a method does while it trains; each does nothing unless a method says otherwise.

    `step` counts optimizer steps from 1. Gradients are those of the whole step, clipped if that was asked
    for; they are still there in `after`. What `state` gives goes into each checkpoint, and comes back
    through `restore`: tensors, numbers and containers of them.
    """

    layers: Mapping[str, Adapted] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=_alone)  # the processes that share each step's examples

    @property
    def settled(self) -> bool:
        """Whether what is trained now may be written: until then no evaluation is the best."""
        return True

    def sees(self, batch: Batch | None) -> None:
        """Before the forward pass of a micro-batch of a step, and with None after it."""

    def penalty(self) -> Tensor | None:
        """What is added to a step's loss, once: this process's part of it."""
        return None

    def before(self, step: int) -> None:
        """Between the backward pass and the optimizer."""

    def after(self, step: int) -> None:
        """After the optimizer."""

    def figures(self) -> Mapping[str, float]:
        """What goes into the metrics of the step that has just been made."""
        return {}

    def by_module(self) -> Mapping[str, Mapping[str, float]]:
        """What the report tells of modules in the end."""
        return {}

    def notes(self) -> Sequence[str]:
        """What must be said beside the numbers."""
        return ()

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""

    def finish(self) -> None:
        """After the last step: settle layers' configs and factors; raise for a promise that was broken."""

    def beside(self, folder: Path, names: Mapping[str, str]) -> None:
        """Write what the method has besides the adapter; `names` are the base's, of modules' weights."""


class Method(Protocol):
    """A module in methods/. Its Options are a frozen dataclass: each field is a flag of `train`.

    A field's metadata hold `help`, and `flags` where the field's name is not how it is typed; None as its
    default means that it was not given. A method may name the modules that it is for where the user names
    none: TARGETS = ("up_proj", ...), ends of their paths.
    """

    @property
    def VARIANT(self) -> str:
        """The variant in adapters/ whose factors it trains."""
        ...

    @property
    def TRAINED(self) -> tuple[str, ...]:
        """The factors that have gradients."""
        ...

    @property
    def RATE(self) -> float:
        """The learning rate where none is given."""
        ...

    @property
    def Options(self) -> type[Any]: ...

    def configure(self, wanted: Wanted, options: Any) -> AdapterConfig:
        """Raises UsageError for what the method cannot be asked for."""
        ...

    def start(
        self, places: Sequence[Place], config: AdapterConfig, options: Any, seed: int
    ) -> Mapping[str, Factors]:
        """The factors of each place at step 0; a Parameter in several places is shared by them."""
        ...

    def groups(self, named: Sequence[Named], rates: Rates, options: Any) -> list[Group]:
        """Every trained parameter in one group."""
        ...

    def hooks(self, layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks: ...


def names() -> list[str]:
    """As users type them: lora_plus.py is `lora+`, lora_fa.py is `lora-fa`."""
    return [typed(name) for name in plugins.names("training.methods")]


def typed(name: str) -> str:
    """A file's name as users type it."""
    return name.replace("_plus", "+").replace("_", "-")


def load(name: str) -> Any:
    """The module of a method by the name that users type. Raises UnknownNameError."""
    known = {typed(file): file for file in plugins.names("training.methods")}
    if name not in known:
        near = plugins.suggestion(name, sorted(known))
        raise UnknownNameError(f"--method {name}: no method. {near}")
    return plugins.load("training.methods", known[name])
