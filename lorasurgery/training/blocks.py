"""MoRAL's layers of one feed-forward block with one router: what its first layer sees chooses for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorasurgery.adapters import moral
from lorasurgery.errors import MatchError

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.adapter import AdapterConfig, Base
    from lorasurgery.training.adapted import Adapted
    from lorasurgery.training.method import Factors


@dataclass(slots=True)
class Routed:
    """The variant as one layer of a block has it: gates are made, or are those that the first layer made last."""

    held: dict[str, Tensor] = field(
        default_factory=dict
    )  # by the name of the layer with the router
    name: str = ""

    ROUTED = True
    LINEAR_IN_W = True

    def detour(
        self,
        x: Tensor,
        factors: Mapping[str, Tensor],
        config: AdapterConfig,
        base: Base | None = None,  # noqa: ARG002 - as a variant has it
    ) -> Tensor:
        """What is added to x Wᵀ. Raises MatchError where the block's first layer has not seen these tokens."""
        if "router" in factors:
            self.held[self.name] = moral.gates(x, factors["router"], config)
        gates = self.held.get(self.name)
        if gates is None or gates.shape[:-1] != x.shape[:-1]:
            raise MatchError(
                f"{self.name}: has the router of its block, but another layer is run before it, or on other "
                "tokens. Train with --router linear."
            )
        return moral.added(x, gates, factors, config)


def block_of(path: str) -> str:
    """The module that holds a layer."""
    return path.rpartition(".")[0]


def leaders(paths: Sequence[str]) -> dict[str, str]:
    """Each layer's first of its block, in the order in which they are run."""
    first: dict[str, str] = {}
    return {path: first.setdefault(block_of(path), path) for path in paths}


def one_router_each(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Factors of all layers, less the routers of those that are not the first of their block."""
    led = leaders(list(factors))
    return {
        path: own if led[path] == path else {n: f for n, f in own.items() if n != "router"}
        for path, own in factors.items()
    }


def connect(layers: Mapping[str, Adapted]) -> None:
    """Let layers without a router have the gates of the one that chooses for them."""
    mixtures = {
        path: la
        for path, la in layers.items()
        if la.config.variant == "moral" and la.layout == "linear"
    }
    led, held = leaders(list(mixtures)), dict[str, "Tensor"]()
    for path, layer in mixtures.items():
        name = path if "router" in layer.factors else moral.follows(layer.config) or led[path]
        if name != path:
            layer.config = replace(layer.config, extra={**layer.config.extra, "router": name})
        layer.variant = Routed(held, name)  # type: ignore[assignment]
