"""AdaLoRA's hooks: scores of all triplets after each step, and which of them the budget lets be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorasurgery.errors import ValueRangeError
from lorasurgery.kernels import adalora_importance
from lorasurgery.training.method import Hooks

if TYPE_CHECKING:
    from lorasurgery.training.adapted import Adapted
    from lorasurgery.training.methods.adalora import Options, Schedule

# the axis that a triplet's mean runs along
AXES = {"A": 1, "E": 1, "B": 0}


class Allocation(Hooks):
    """Ī and Ū of every factor; a triplet's score [r] and whether it stays, by module."""

    def __init__(self, layers: Mapping[str, Adapted], plan: Schedule, options: Options) -> None:
        super().__init__(layers)
        self._plan, self._options = plan, options
        self._step = 0
        self._smooth: dict[str, tuple[Tensor, Tensor]] = {}
        self._scores: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}

    @property
    def settled(self) -> bool:
        """Whether the ranks are those that are written."""
        return self._step >= self._plan.settled

    def penalty(self) -> Tensor | None:
        if not self._options.orthogonality:
            return None
        norms = [norm for layer in self.layers.values() for norm in _skew(layer)]
        # every process has the same factors
        return self._options.orthogonality * torch.stack(norms).mean() / self.ranks.count

    @torch.no_grad()
    def after(self, step: int) -> None:
        self._step = step
        if step < self._plan.settled or not self._scores:
            self._scores = {path: self._score(path) for path in self.layers}
        if self._plan.due(step):
            self._kept = self._choose(self._plan.budget(step, len(self.layers)))
        if self._plan.due(step) or self.settled:
            for path, layer in self.layers.items():
                layer.factors["E"].masked_fill_(~self._kept[path][:, None], 0)

    def figures(self) -> Mapping[str, float]:
        """The budget, and what is left: less only where triplets are of one score."""
        return {"budget": self._plan.budget(self._step, len(self.layers)), "ranks": self._left()}

    def by_module(self) -> Mapping[str, Mapping[str, float]]:
        return {path: {"rank": self._rank(path)} for path in self.layers}

    def state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "smooth": dict(self._smooth),
            "scores": dict(self._scores),
            "kept": dict(self._kept),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        self._smooth, self._scores = dict(state["smooth"]), dict(state["scores"])
        self._kept = dict(state["kept"])

    def finish(self) -> None:
        """Leave out the triplets that are gone. Raises ValueRangeError where more are left than asked for."""
        budget = self._plan.last * len(self.layers)
        if self._step and self._left() > budget:
            raise ValueRangeError(
                f"adalora: {self._left()} triplets are left after step {self._step}, but the budget is "
                f"{budget}. Train to the end."
            )
        for path, layer in self.layers.items():
            if path in self._kept:
                _leave(layer, self._kept[path])

    def _left(self) -> int:
        return sum(self._rank(path) for path in self.layers)

    def _rank(self, path: str) -> int:
        return int(self._kept[path].sum()) if path in self._kept else self._plan.first

    def _score(self, path: str) -> Tensor:
        """S = s(E) + mean s(P) + mean s(Q) of each triplet."""
        total = torch.zeros((), dtype=torch.float32)
        for name, axis in AXES.items():
            factor = self.layers[path].factors[name]
            w = factor.detach().float()
            grad = torch.zeros_like(w) if factor.grad is None else factor.grad.float()
            fresh = torch.zeros_like(w), torch.zeros_like(w)
            smooth, wide = self._smooth.get(f"{path}.{name}", fresh)
            betas = self._options.sensitivity_beta, self._options.uncertainty_beta
            smooth, wide, mean = adalora_importance.run(w, grad, smooth, wide, axis, *betas)
            self._smooth[f"{path}.{name}"] = smooth, wide
            total = total.to(mean) + mean
        return total

    def _choose(self, budget: int) -> dict[str, Tensor]:
        """The highest scores of all modules."""
        scores = [self._scores[path] for path in self.layers]
        parts = adalora_importance.kept(torch.cat(scores), budget).split([len(s) for s in scores])
        return dict(zip(self.layers, parts, strict=True))


def _skew(layer: Adapted) -> list[Tensor]:
    """How far P's columns and Q's rows are from orthonormal."""
    a, b = layer.factors["A"], layer.factors["B"]
    one = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return [torch.linalg.matrix_norm(a @ a.T - one), torch.linalg.matrix_norm(b.T @ b - one)]


def _leave(layer: Adapted, kept: Tensor) -> None:
    """The layer with these triplets alone, and the config that says which they were."""
    for name, axis in AXES.items():
        factor = layer.factors[name]
        chosen = factor.detach()[:, kept] if axis == 0 else factor.detach()[kept]
        layer.factors[name] = nn.Parameter(chosen, requires_grad=factor.requires_grad)
    said = {"kept": int(kept.sum()), "mask": kept.tolist()}
    layer.config = replace(layer.config, extra={**layer.config.extra, **said})
