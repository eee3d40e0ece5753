"""An adapter whose start was taken out of its base, as a plain LoRA: ΔW = s (B A - B₀ A₀), of rank 2 r.

PiSSA, OLoRA, CorDA and LoRA-GA move s B₀ A₀ out of W when training begins; LoftQ quantizes W on top of it. What
PEFT does with path_initial_model_for_weight_conversion, and only while the model is still in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.arrays import Array
from lorasurgery.dialects import peft
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of the start: the adapter before training, or the model that training saw."""

    init: Path | None = None
    residual: Path | None = None

    def __bool__(self) -> bool:
        return self.init is not None or self.residual is not None

    @property
    def inputs(self) -> dict[str, Path]:
        given = {"init": self.init, "residual": self.residual}
        return {role: path for role, path in given.items() if path is not None}

    def check(self) -> None:
        """Raises UsageError."""
        if self.init and self.residual:
            raise UsageError("--init: says the same as --residual. Pass one of the two.")

    def open(self, path: Path) -> Adapter:
        """The adapter for the base as it was; with `residual`, for what training saw.

        Raises UsageError where there was no start, MatchError where the two do not belong together.
        """
        flag = "--init" if self.init else "--residual"
        adapter, start = peft.read_plain(path, flag)
        if start is None:
            raise UsageError(
                f"{flag}: {path} began as {adapter.settings['init_lora_weights']!r}, which takes nothing "
                "out of its base. Take it away."
            )
        if self.init is None:
            return replace(adapter, base=str(self.residual))
        if start == "loftq":
            raise MatchError(
                f"{path}: LoftQ's base is what its quantization left, which the factors of its start do "
                "not tell. Pass --residual DIR, the model that it was trained on."
            )
        if start == "olora" and adapter.settings.get("fan_in_fan_out"):
            raise MatchError(
                f"{path}: PEFT takes OLoRA's start out of a turned weight the wrong way round. Pass "
                "--residual DIR, the model that it was trained on."
            )
        return _without(adapter, peft.read_plain(self.init, flag)[0])


def _without(adapter: Adapter, start: Adapter) -> Adapter:
    begun = {name_of(site): site for site in start.sites}
    odd = [s for s in adapter.sites if not _alike(s, begun.get(name_of(s)))]
    if odd:
        first, other = odd[0], begun.get(name_of(odd[0]))
        has = f"{_facts(other)}" if other else "none"
        raise MatchError(
            f"{start.path}: {name_of(first)} has {has}, but in {adapter.path} it has {_facts(first)}. "
            "Name the start of this very training."
        )
    sites = tuple(_difference(site, begun[name_of(site)]) for site in adapter.sites)
    return replace(adapter, sites=sites)


def _alike(site: Site, start: Site | None) -> bool:
    return start is not None and _facts(site) == _facts(start)


def _facts(site: Site) -> str:
    shapes = ", ".join(f"{name} {list(info.shape)}" for name, info in site.factors.items())
    return f"{shapes} scaled by {site.config.scaling:g}"


def _difference(site: Site, start: Site) -> Site:
    if site.layout == "embedding":  # PEFT lets them begin at zero
        return site
    a, b = site.factors["A"].shape, site.factors["B"].shape

    def load() -> Mapping[str, Array]:
        now, then = site.load(), start.load()
        return {
            "A": np.concatenate([now["A"], then["A"]], axis=-2),
            "B": np.concatenate([now["B"], -then["B"]], axis=-1),
        }

    shapes = {"A": (*a[:-2], 2 * a[-2], a[-1]), "B": (*b[:-1], 2 * b[-1])}
    rank = 2 * site.config.rank
    return replace(
        site,
        config=AdapterConfig("lora", rank, rank * site.config.scaling),
        factors={name: TensorInfo(name, "F32", shape) for name, shape in shapes.items()},
        load=load,
    )
