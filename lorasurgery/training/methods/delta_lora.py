"""Delta-LoRA: after each step past --start, W itself moves by λ times what the step did to s · B A.

Zi et al. 2023, arXiv 2309.02411, §3. With a constant λ these moves add up to λ s (B A - B₀ A₀), where B₀ A₀ is the
pair after the last step that moved nothing: W stays as it is, whatever its dtype, and no move is lost in rounding.
What is lost in bfloat16 when W moves in place: nearly all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import UsageError
from lorasurgery.training.method import Hooks, Wanted
from lorasurgery.training.methods.lora import RATE, TRAINED, config_of, groups, start

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "delta_lora"
BASE_DELTA = "base_delta.safetensors"


@dataclass(frozen=True, slots=True)
class Options:
    """What Delta-LoRA alone has."""

    strength: float = field(
        default=2.0, metadata={"help": "λ, how far W follows.", "flags": ("--lambda",)}
    )
    start: int = field(
        default=500, metadata={"help": "W moves after steps past this one; -1: from the first on."}
    )
    save_base_delta: bool = field(
        default=False,
        metadata={"help": "Write what W has moved by as well, into base_delta.safetensors."},
    )


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError for dropout, with which W's gradient is no longer that of B A."""
    if wanted.dropout:
        raise UsageError(
            f"--dropout {wanted.dropout:g}: what B A learns behind a mask is not what W would, so that "
            "Delta-LoRA has none. Take it away."
        )
    if not 0 <= options.strength < float("inf"):
        raise UsageError(
            f"--lambda {options.strength:g}: is no such strength. 0.5 and 2 are the paper's."
        )
    if options.start < -1:
        raise UsageError(
            f"--start {options.start}: is before the first step. Pass -1 to move from the first on."
        )
    config = config_of(VARIANT, wanted)
    return replace(config, extra={"lambda": options.strength, "start": options.start})


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """The snapshot."""
    return Snapshot(layers, options)


class Snapshot(Hooks):
    """A₀ and B₀ go along with A and B until W begins to move: its first move is that of step start + 2."""

    def __init__(self, layers: Mapping[str, Adapted], options: Options) -> None:
        super().__init__(layers)
        self._options, self._step = options, 0

    def after(self, step: int) -> None:
        self._step = step
        self._follow()

    def state(self) -> dict[str, Any]:
        return {"step": self._step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The pair itself is among the factors; that of the best evaluation may be older than they."""
        self._step = int(state["step"])
        self._follow()

    def beside(self, folder: Path, names: Mapping[str, str]) -> None:
        """λ s (B A - B₀ A₀) of each weight, float32, as the base stores it: W with it and LoRA's B A are the result."""
        if self._options.save_base_delta:
            from lorasurgery.training.base_delta import write

            write(folder / BASE_DELTA, self.layers, names)

    def _follow(self) -> None:
        # the paper counts updates from 0
        if self._step > self._options.start + 1:
            return
        for layer in self.layers.values():
            for name in TRAINED:
                layer.factors[f"{name}0"].data.copy_(layer.factors[name].data)
