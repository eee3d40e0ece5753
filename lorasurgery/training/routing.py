"""MoRAL's hooks: how often each expert is chosen, how far its gate is open, and a term that wants them used alike.

Positions that predict a label are counted; steps further back count less, by 0.9 each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lorasurgery.adapters import moral
from lorasurgery.training.examples import IGNORED
from lorasurgery.training.method import Hooks

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted
    from lorasurgery.training.batches import Batch
    from lorasurgery.training.methods.moral import Options

FORGETS = 0.9


class Routing(Hooks):
    """Sums [3, N] by module: of gates, of choices, and of tokens N times."""

    def __init__(self, layers: Mapping[str, Adapted], options: Options) -> None:
        super().__init__(layers)
        self._options = options
        self._counted: Tensor | None = None  # which positions of the micro-batch
        self._now: dict[str, Tensor] = {}  # of this step
        self._past: dict[str, Tensor] = {}
        self._uneven: list[Tensor] = []
        for path, layer in layers.items():
            layer.register_forward_pre_hook(partial(self._count, path))

    def sees(self, batch: Batch) -> None:
        labels = batch.labels
        self._counted = batch.mask == 1 if batch.mask is not None else labels != IGNORED

    def penalty(self) -> Tensor | None:
        """The mean over modules and micro-batches, 1 where experts are used alike."""
        terms, self._uneven = self._uneven, []
        return self._options.balance * torch.stack(terms).mean() if terms else None

    def after(self, step: int) -> None:  # noqa: ARG002 - as Hooks has it
        now, self._now = self._now, {}
        self._past = {p: FORGETS * self._past.get(p, 0 * sums) + sums for p, sums in now.items()}

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
        for path, sums in self._past.items():
            layer = self.layers[path]
            means = [float(mean) for mean in sums[0] / sums[2]]
            layer.config = replace(layer.config, extra={**layer.config.extra, "gate_means": means})

    def _loads(self, path: str) -> Tensor:
        """Each expert's share of all choices [N]; they sum to 1."""
        _, chosen, _ = self._past[path]
        return cast(Tensor, chosen / chosen.sum())

    def _count(self, path: str, layer: Adapted, given: tuple[Tensor, ...]) -> None:
        if not layer.training or self._counted is None:
            return
        x = given[0].detach()
        # a layer that has picked tokens of its own sees them without their places
        seen = x[self._counted.to(x.device)] if x.shape[:-1] == self._counted.shape else x
        router = layer.factors["router"]
        seen = seen.reshape(-1, x.shape[-1]).to(router.dtype)
        with torch.no_grad():
            gates = moral.gates(seen, router, layer.config)
            chosen = (gates > 0).double().sum(0)
            sums = torch.stack([gates.double().sum(0), chosen, torch.full_like(chosen, len(seen))])
        self._now[path] = self._now.get(path, 0 * sums) + sums
        if self._options.balance and len(seen):
            likely = (seen @ router.T).softmax(-1).mean(0)
            share = (chosen / chosen.sum()).to(likely)
            self._uneven.append(len(share) * (share * likely).sum())
