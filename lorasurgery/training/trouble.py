"""A loss that is no number: in which step, and which module gave the first such value."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorasurgery.errors import ValueRangeError
from lorasurgery.training.method import Named


class Trouble:
    """One step; gradients of a step that failed are taken away."""

    def __init__(self, model: nn.Module, step: int) -> None:
        self._model, self._step = model, step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            self._model.zero_grad()

    def check_loss(self, value: float, again: Callable[[], Tensor]) -> None:
        """Raises ValueRangeError; the step is run once more to find where it began."""
        if math.isfinite(value):
            return
        with torch.no_grad(), _watched(self._model) as seen:
            again()
        where = f"first in {seen[0]}" if seen else "in the loss itself"
        raise ValueRangeError(
            f"step {self._step}: the loss is {value}, {where}. Lower --lr, or clip with --clip."
        )


def blame(named: Sequence[Named], step: int) -> ValueRangeError:
    """The error for gradients that are no numbers."""
    first = next(
        (n.name for n in named if n.parameter.grad is not None and not _finite(n.parameter.grad)),
        "their sum",
    )
    return ValueRangeError(
        f"step {step}: the gradient is no number, first in {first}. Lower --lr, or clip with --clip."
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[str]]:
    """The paths of modules whose output is no number, in the order in which they gave it."""
    seen: list[str] = []

    def look(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(_module: Any, _given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and not _finite(out):
                seen.append(name)

        return hook

    handles = [m.register_forward_hook(look(n)) for n, m in model.named_modules() if n]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
