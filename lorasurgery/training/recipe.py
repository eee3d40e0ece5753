"""How long and how fast to train."""

from __future__ import annotations

from dataclasses import dataclass

from lorasurgery.errors import UsageError
from lorasurgery.training.schedule import Schedule


@dataclass(frozen=True, slots=True)
class Recipe:
    """`steps` are optimizer steps, each of batch · accumulate examples."""

    steps: int
    batch: int = 4
    accumulate: int = 1
    warmup: int = 0
    schedule: Schedule = "linear"
    clip: float | None = 1.0
    seed: int = 0
    autocast: bool = False  # bfloat16 products
    checkpointing: bool = False
    evaluate_every: int | None = None
    patience: int | None = None  # evaluations without a better one
    save_every: int | None = None

    def __post_init__(self) -> None:
        if self.warmup > self.steps:
            raise UsageError(
                f"--warmup {self.warmup}: is longer than the run of {self.steps} steps. Shorten it."
            )
