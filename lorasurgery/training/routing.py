"""MoRAL's hooks: how often each expert is chosen, how far its gate is open, and terms that the router alone learns from.

Positions that predict a label are counted; steps further back count less, by 0.9 each. The terms are means over all of
a step's tokens, however they come in micro-batches and processes: their gradients are summed up beside the pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lorasurgery.adapters import moral
from lorasurgery.training.blocks import connect
from lorasurgery.training.examples import IGNORED
from lorasurgery.training.method import Hooks
from lorasurgery.training.router_terms import RouterTerms

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted
    from lorasurgery.training.batches import Batch
    from lorasurgery.training.methods.moral import Options

FORGETS = 0.9


class Routing(Hooks):
    """Sums [3, N] by module with a router: of gates, of choices, and of tokens N times."""

    def __init__(self, layers: Mapping[str, Adapted], options: Options) -> None:
        super().__init__(layers)
        connect(layers)
        self._options = options
        self._counted: Tensor | None = None  # which positions of the micro-batch
        self._now: dict[str, Tensor] = {}  # of this step
        self._past: dict[str, Tensor] = {}
        self._terms: dict[str, RouterTerms] = {}
        for path, layer in layers.items():
            if "router" in layer.factors:
                layer.register_forward_pre_hook(partial(self._count, path))

    def sees(self, batch: Batch | None) -> None:
        self._counted = None
        if batch is not None:
            mask = batch.mask
            self._counted = mask == 1 if mask is not None else batch.labels != IGNORED

    def penalty(self) -> Tensor | None:
        """The mean over routers; the balance is 1 where experts are used alike."""
        if not self._terms:
            return None
        terms, self._terms = self._terms, {}
        sums = self.ranks.total(torch.stack([self._now[path] for path in terms]))
        balance, z_loss = self._options.balance, self._options.z_loss
        found = [
            balance * term.balance(total[1], total[2]) + z_loss * term.z_loss(total[2])
            for term, total in zip(terms.values(), sums, strict=True)
        ]
        return torch.stack(found).mean()

    def after(self, step: int) -> None:  # noqa: ARG002 - as Hooks has it
        now, self._now = self._now, {}
        every = self.ranks.total(torch.stack(list(now.values())))
        for path, sums in zip(now, every, strict=True):
            self._past[path] = FORGETS * self._past.get(path, 0 * sums) + sums

    def figures(self) -> Mapping[str, float]:
        """The least and the most that an expert is chosen; 1 / N is alike."""
        loads = torch.stack([self._loads(path) for path in self._past])
        return {"least_load": float(loads.min()), "most_load": float(loads.max())}

    def by_module(self) -> Mapping[str, Mapping[str, float]]:
        if not self._options.report_routing:
            return {}
        return {
            path: {f"expert_{i}": load for i, load in enumerate(self._loads(path).tolist())}
            for path in self._past
        }

    def state(self) -> dict[str, Any]:
        return {"past": dict(self._past)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._past = dict(state["past"])

    def finish(self) -> None:
        """Record the mean gates, with which a static mixture is made."""
        for path, layer in self.layers.items():
            sums = self._past.get(moral.follows(layer.config) or path)
            if sums is not None:
                means = [float(mean) for mean in sums[0] / sums[2]]
                layer.config = replace(
                    layer.config, extra={**layer.config.extra, "gate_means": means}
                )

    def _loads(self, path: str) -> Tensor:
        """Each expert's share of all choices [N]; they sum to 1."""
        _, chosen, _ = self._past[path]
        return cast(Tensor, chosen / chosen.sum())

    @torch.no_grad()
    def _count(self, path: str, layer: Adapted, given: tuple[Tensor, ...]) -> None:
        if not layer.training or self._counted is None:
            return
        x = given[0].detach()
        # a layer that has picked tokens of its own sees them without their places
        seen = x[self._counted.to(x.device)] if x.shape[:-1] == self._counted.shape else x
        router = layer.factors["router"]
        seen = seen.reshape(-1, x.shape[-1]).to(router.dtype)
        gates = moral.gates(seen, router, layer.config)
        chosen = (gates > 0).double().sum(0)
        sums = torch.stack([gates.double().sum(0), chosen, torch.full_like(chosen, len(seen))])
        self._now[path] = self._now.get(path, 0 * sums) + sums
        if self._options.balance or self._options.z_loss:
            self._terms.setdefault(path, RouterTerms(router)).add(seen)
