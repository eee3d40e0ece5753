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
from lorasurgery.training.chance import chances, take_chance
from lorasurgery.training.examples import Example
from lorasurgery.training.method import Hooks
from lorasurgery.training.optimizer import set_rates
from lorasurgery.training.ranks import ALONE, Ranks
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
    ranks: Ranks = ALONE

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
        batches, count = self.batches(number), self._count(number)
        with Trouble(parts.model, number) as trouble:
            (value,) = parts.ranks.sums(sum(self._gradients(batch, count) for batch in batches))
            trouble.check_loss(value, lambda: self.forward(batches[0]))
            penalty = self._penalty()
            parts.ranks.add_gradients(self._trained)
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
        told |= {} if penalty is None else {"penalty": penalty}
        paging: Mapping[str, float] = getattr(parts.optimizer, "figures", dict)()
        return {**told, **_named_rates(rates), **parts.hooks.figures(), **paging}

    def batches(self, number: int) -> list[Batch]:
        """The micro-batches of a step that are for this process: they follow from its number alone."""
        size, chosen = self.recipe.batch, self.parts.ranks.mine(self._examples(number))
        parts = range(0, len(chosen), size)
        return [collate(chosen[at : at + size], self.parts.padding) for at in parts]

    def evaluate(self, examples: Sequence[Example]) -> float:
        """The mean loss over held-out examples, without dropout."""
        model, ranks, total, count = self.parts.model, self.parts.ranks, 0.0, 0
        training = model.training
        model.eval()
        a_round = self.recipe.batch * ranks.count
        with torch.no_grad():
            for start in range(0, len(examples), a_round):
                chosen = ranks.mine(examples[start : start + a_round])
                # a process that has none left still takes part in the others' exchanges
                batch = collate(chosen or examples[:1], self.parts.padding)
                value = float(self.forward(batch))
                total += value if chosen else 0.0
                count += batch.predicted if chosen else 0
        model.train(training)
        total, counted = ranks.sums(total, count)
        return total / counted

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
        chance = chances(self._device, self.parts.ranks)
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
        take_chance(state.chance, self._device, self.parts.ranks)
        self.step_done, self.tokens = state.step, state.tokens
        self.metrics, self.losses = state.metrics, state.losses
        self.best, self.stale = state.best, state.stale

    def _held(self) -> Mapping[str, Tensor]:
        layers = self.parts.detours.layers
        factors = {f"{path}.{n}": f for path, la in layers.items() for n, f in la.factors.items()}
        return {**factors, **self.parts.detours.whole}

    def _examples(self, number: int) -> list[Example]:
        """All processes' of a step."""
        a_step = self.recipe.batch * self.recipe.accumulate
        seen = range((number - 1) * a_step, number * a_step)
        return [self.parts.examples[self._order[i]] for i in seen]

    def _count(self, number: int) -> int:
        """Positions with a loss, of all processes."""
        return sum(example.predicted for example in self._examples(number))

    def _gradients(self, batch: Batch, count: int) -> float:
        self.parts.hooks.sees(batch)
        value = self.forward(batch) / count
        # activations that are computed again are not seen twice
        self.parts.hooks.sees(None)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    def _penalty(self) -> float | None:
        """All processes' together; its gradients are added to this one's."""
        penalty = self.parts.hooks.penalty()
        if penalty is None:
            return None
        penalty.backward()  # type: ignore[no-untyped-call]
        (value,) = self.parts.ranks.sums(float(penalty.detach()))
        return value

    def forward(self, batch: Batch) -> Tensor:
        """The loss, summed over the batch's labels."""
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
