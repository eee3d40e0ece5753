"""All that a run of training is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from lorasurgery.codec import CodecOptions
from lorasurgery.errors import UsageError
from lorasurgery.training.attach import Targets
from lorasurgery.training.examples import Reading
from lorasurgery.training.method import Wanted
from lorasurgery.training.optimizer import Settings
from lorasurgery.training.schedule import Schedule

# called with what can be told of each step, and how many there will be
Watch: TypeAlias = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True, slots=True)
class Pace:
    """A Recipe as it is asked for: its length in steps, or in passes over the data."""

    steps: int | None = None
    epochs: float = 1.0
    batch: int = 4
    accumulate: int = 1
    rate: float | None = None  # None: the method's own
    decay: float = 0.0
    warmup: float = 0.0  # steps, or below 1 a share of them
    schedule: Schedule = "linear"
    clip: float | None = 1.0
    optimizer: str = "adamw"
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Held:
    """What is held out, and what is kept on the way."""

    data: tuple[str, ...] = ()
    evaluate_every: int | None = None
    patience: int | None = None
    save_every: int = 50


@dataclass(frozen=True, slots=True)
class Machine:
    """Where numbers live while they are trained."""

    dtype: str = "float32"  # of the base
    device: str = "auto"
    autocast: bool = False
    checkpointing: bool = False
    nf4: CodecOptions | None = None  # QLoRA: how linear weights are packed that are not yet
    report_memory: bool = False  # what a forward pass keeps for the backward pass


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """`own` are the method's Options, or None for their defaults."""

    method: str
    data: tuple[str, ...]
    name: str  # of the base, as it was typed
    wanted: Wanted = field(default_factory=Wanted)
    own: Any = None
    targets: Targets = field(default_factory=Targets)
    reading: Reading = field(default_factory=Reading)
    pace: Pace = Pace()
    held: Held = Held()
    machine: Machine = Machine()
    dialect: str | None = None
    watch: Watch = field(default=lambda _told, _steps: None, compare=False)

    def check(self) -> None:
        """Raises UsageError for a number that cannot be meant."""
        pace, wanted = self.pace, self.wanted
        limits = (
            ("--epochs", pace.epochs, math.inf), ("--lr", pace.rate, math.inf),
            ("--weight-decay", pace.decay, math.inf), ("--warmup", pace.warmup, math.inf),
            ("--beta2", pace.settings.betas[1], 1.0), ("--alpha", wanted.alpha, math.inf),
            ("--seed", wanted.seed, 2.0**63),
        )  # fmt: skip
        for flag, value, limit in limits:
            if value is not None and not 0 <= value < limit:
                raise UsageError(
                    f"{flag} {value:g}: is out of range. Pass 0 or more, below {limit:g}."
                )

    @property
    def settings(self) -> dict[str, Any]:
        """For surgery.json, and what tells one run from another."""
        kept = {k: v for k, v in asdict(self).items() if k not in ("watch", "own", "name")}
        del kept["machine"]["report_memory"]  # changes nothing
        return {**kept, "own": asdict(self.own) if self.own else {}}
