"""The loop: gradients of a few micro-batches, clipped, handed to the method and the optimizer.

Losses are means over all labelled tokens of a step, however they are split into micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorasurgery.training import loss
from lorasurgery.training.attach import Detours
from lorasurgery.training.batches import Batch, Order, collate
from lorasurgery.training.examples import Example
from lorasurgery.training.method import Hooks
from lorasurgery.training.optimizer import set_rates
from lorasurgery.training.recipe import Recipe
from lorasurgery.training.schedule import factor
from lorasurgery.training.state import Best, State
from lorasurgery.training.trouble import Trouble, blame

_REMEMBERED = 10  # losses whose mean is told at the end


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of."""

    detours: Detours
    hooks: Hooks
    optimizer: Optimizer
    examples: Sequence[Example]
    padding: int

    @property
    def model(self) -> nn.Module:
        return self.detours.model


class Trainer:
    """Steps one after another; `capture` and `restore` are its whole memory."""

    def __init__(self, parts: Parts, recipe: Recipe) -> None:
        self.parts, self.recipe = parts, recipe
        self.step_done = self.tokens = self.metrics = self.stale = 0
        self.losses: list[float] = []
        self.best: Best | None = None
        self._order = Order(len(parts.examples), recipe.seed)
        self._device = next(parts.model.parameters()).device
        self._trained = [named.parameter for named in parts.detours.named()]

    def step(self) -> dict[str, float]:
        """One optimizer step; what can be told of it. Raises ValueRangeError for a loss that is no number."""
        number, parts = self.step_done + 1, self.parts
        batches = self.batches(number)
        count = sum(batch.predicted for batch in batches)
        with Trouble(parts.model, number) as trouble:
            value = 0.0
            for batch in batches:
                parts.hooks.sees(batch)
                value += self._gradients(batch, count)
            trouble.check_loss(value, lambda: self._forward(batches[0]))
            penalty = parts.hooks.penalty()
            if penalty is not None:
                penalty.backward()  # type: ignore[no-untyped-call]
            norm = self._clip()
            if not math.isfinite(norm):
                raise blame(parts.detours.named(), number)
        rates = set_rates(parts.optimizer, self._factor(number))
        parts.hooks.before(number)
        parts.optimizer.step()
        parts.hooks.after(number)
        parts.optimizer.zero_grad()
        self.step_done, self.tokens = number, self.tokens + count
        self.losses = [*self.losses, value][-_REMEMBERED:]
        told = {"step": number, "loss": value, "grad_norm": norm, "tokens": self.tokens}
        told |= {} if penalty is None else {"penalty": float(penalty.detach())}
        return {**told, **_named_rates(rates), **parts.hooks.figures()}

    def batches(self, number: int) -> list[Batch]:
        """The micro-batches of a step: they follow from its number alone."""
        size, parts = self.recipe.batch, self.parts
        first = (number - 1) * size * self.recipe.accumulate
        made = []
        for start in range(first, first + size * self.recipe.accumulate, size):
            chosen = [parts.examples[self._order[i]] for i in range(start, start + size)]
            made.append(collate(chosen, parts.padding))
        return made

    def evaluate(self, examples: Sequence[Example]) -> float:
        """The mean loss over held-out examples, without dropout."""
        model, total, count = self.parts.model, 0.0, 0
        training = model.training
        model.eval()
        with torch.no_grad():
            for start in range(0, len(examples), self.recipe.batch):
                batch = collate(examples[start : start + self.recipe.batch], self.parts.padding)
                total += float(self._forward(batch))
                count += batch.predicted
        model.train(training)
        return total / count

    @property
    def over(self) -> bool:
        """Whether all steps are made, or evaluations have not become better for too long."""
        patience = self.recipe.patience
        return self.step_done >= self.recipe.steps or (
            patience is not None and self.stale >= patience
        )

    def due(self, every: int | None) -> bool:
        """Whether what is done every so many steps, and after the last, is to be done now."""
        return self.over or (every is not None and self.step_done % every == 0)

    def judge(self, value: float) -> None:
        """Remember the best evaluation."""
        if not self.parts.hooks.settled:
            return
        if self.best is None or value < self.best.loss:
            trained = {n.name: n.parameter.detach().clone() for n in self.parts.detours.named()}
            self.best = Best(value, self.step_done, trained, self.parts.hooks.state())
            self.stale = 0
        else:
            self.stale += 1

    def take_best(self) -> None:
        """Go back to what the best evaluation saw."""
        if self.best is not None:
            for named in self.parts.detours.named():
                _put(named.parameter, self.best.parameters[named.name])
            self.parts.hooks.restore(self.best.method)

    def capture(self) -> State:
        """Everything, to be saved; tensors are the live ones."""
        held = {name: tensor.detach() for name, tensor in self._held().items()}
        chance = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            chance["cuda"] = torch.cuda.get_rng_state(self._device)
        return State(
            self.step_done, self.tokens, held, self.parts.optimizer.state_dict(),
            self.parts.hooks.state(), chance, self.metrics, self.losses, self.best, self.stale,
        )  # fmt: skip

    def restore(self, state: State) -> None:
        """Go on from there."""
        for name, tensor in self._held().items():
            _put(tensor, state.parameters[name])
        self.parts.optimizer.load_state_dict(state.optimizer)
        self.parts.hooks.restore(state.method)
        torch.set_rng_state(state.chance["cpu"])
        if "cuda" in state.chance:
            torch.cuda.set_rng_state(state.chance["cuda"], self._device)
        self.step_done, self.tokens = state.step, state.tokens
        self.metrics, self.losses = state.metrics, state.losses
        self.best, self.stale = state.best, state.stale

    def _held(self) -> Mapping[str, Tensor]:
        layers = self.parts.detours.layers
        factors = {f"{path}.{n}": f for path, la in layers.items() for n, f in la.factors.items()}
        return {**factors, **self.parts.detours.whole}

    def _gradients(self, batch: Batch, count: int) -> float:
        value = self._forward(batch) / count
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    def _forward(self, batch: Batch) -> Tensor:
        recipe, kind = self.recipe, self._device.type
        with torch.autocast(kind, torch.bfloat16, enabled=recipe.autocast):
            return loss.total(self.parts.model, batch.to(self._device))

    def _clip(self) -> float:
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        return float(nn.utils.clip_grad_norm_(self._trained, limit))

    def _factor(self, number: int) -> float:
        recipe = self.recipe
        return factor(number, recipe.steps, recipe.warmup, recipe.schedule)


def _put(parameter: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


def _named_rates(rates: Mapping[str, float]) -> dict[str, Any]:
    """One rate as `rate`, several as `rate.B`."""
    if len(set(rates.values())) == 1:
        return {"rate": next(iter(rates.values()))}
    return {f"rate.{name}": rate for name, rate in rates.items()}
