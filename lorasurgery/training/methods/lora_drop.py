"""LoRA-drop: a pair for each module that matters; the others of one kind and size share a pair for all of them.

Zhou et al. 2024, arXiv 2402.07721, §3. Which modules matter, `lorasurgery select` tells. The shared pairs are trained
too; with --share none those modules are left as they are, and what is written is a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasurgery.adapter import AdapterConfig
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.training.kept import Kept
from lorasurgery.training.method import Factors, Hooks, Place, Wanted
from lorasurgery.training.methods.lora import RATE, TRAINED, config_of, groups

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "lora_drop"


@dataclass(frozen=True, slots=True)
class Options:
    """What LoRA-drop alone has."""

    keep: str | None = field(
        default=None, metadata={"help": "What `lorasurgery select` has written."}
    )
    share: Literal["trainable", "none"] = field(
        default="trainable", metadata={"help": "The other modules share a pair for each size, or have none."}
    )  # fmt: skip


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Raises UsageError where nobody has said what to keep."""
    kept(options)
    return config_of(VARIANT if options.share == "trainable" else "lora", wanted)


def kept(options: Options) -> Kept:
    """Raises FormatError for a file that tells nothing of the kind."""
    if options.keep is None:
        raise UsageError(
            "--keep: lora-drop must know which modules matter. Run `lorasurgery select BASE --data ... "
            "-o FILE`, and pass that file."
        )
    return Kept.read(Path(options.keep))


def start(
    places: Sequence[Place], config: AdapterConfig, options: Any, seed: int
) -> Mapping[str, Factors]:
    """Raises MatchError for modules that were not weighed, or are not adapted."""
    from torch import nn

    from lorasurgery.training.start import each

    found = kept(options)
    _check(found, {place.module for place in places}, options.keep)
    alone = [place for place in places if place.module in found.keep]
    factors = dict(each(alone, config, seed))
    if options.share == "none":
        return factors
    shared: dict[str, Factors] = {}
    for place in (place for place in places if place.module not in found.keep):
        name = group_of(place)
        if name not in shared:
            ((_, pair),) = each([Place(f"shared.{name}", place.base)], config, seed).items()
            # a Parameter that several places have stays one
            shared[name] = {k: nn.Parameter(f, requires_grad=False) for k, f in pair.items()}
        factors[place.module] = shared[name]
    return factors


def group_of(place: Place) -> str:
    """Modules of one kind and size: q_proj.576x576."""
    out, in_ = place.sides
    return f"{place.module.rpartition('.')[2]}.{out}x{in_}"


def _check(found: Kept, places: set[str], file: str) -> None:
    if strange := sorted(places ^ set(found.weighed)):
        here = "is adapted" if strange[0] in places else "is not adapted"
        there = "was weighed" if strange[0] in found.weighed else "was not weighed"
        raise MatchError(
            f"--keep {file}: {strange[0]} {here} but {there}, and {len(strange) - 1} more are so. Select "
            "with the same base and --target-modules."
        )


def hooks(layers: Mapping[str, Adapted], wanted: Wanted, options: Any) -> Hooks:
    """Which pair each layer has, to be written."""
    return Shares(layers, kept(options))


class Shares(Hooks):
    """Nothing happens while it trains: autograd adds a shared pair's gradients up."""

    def __init__(self, layers: Mapping[str, Adapted], found: Kept) -> None:
        super().__init__(layers)
        self._found = found

    def finish(self) -> None:
        for path, layer in self.layers.items():
            if path not in self._found.keep:
                said = {"shared": group_of(Place(path, layer.base))}
                layer.config = replace(layer.config, extra={**layer.config.extra, **said})
