"""Which examples a step sees, told from the seed and the position alone, and how they become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorasurgery.training.examples import IGNORED, Example


class Order:
    """Passes over the data, each in an order of its own: element i is the i-th example that is seen."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._pass, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, position: int) -> int:
        number, at = divmod(position, self._count)
        if number != self._pass:
            dice = np.random.Generator(np.random.PCG64([self._seed, number]))
            self._pass, self._order = number, dice.permutation(self._count)
        return int(self._order[at])


@dataclass(frozen=True, slots=True)
class Batch:
    """`labels` are shifted already: position i's is the token after it, or IGNORED.

    tokens, labels: int64 [batch, length];  positions: the same, or None;  mask: [batch, length] of an encoder.
    Of a classification, labels are int64 [batch].
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    @property
    def predicted(self) -> int:
        """Positions with a loss."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        parts = (self.tokens, self.labels, self.positions, self.mask)
        return Batch(*(None if p is None else p.to(device) for p in parts))  # type: ignore[arg-type]


def collate(examples: Sequence[Example], padding: int) -> Batch:
    """Padded on the right, where a causal model's tokens do not look."""
    length = max(len(e.tokens) for e in examples)
    tokens = torch.full((len(examples), length), padding)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    labels = torch.full((len(examples), length), IGNORED)
    positions = torch.arange(length).repeat(len(examples), 1)
    for row, example in enumerate(examples):
        end = len(example.tokens)
        tokens[row, :end], mask[row, :end] = torch.tensor(example.tokens), 1
        if example.label is None:
            labels[row, : end - 1] = torch.tensor(example.labels[1:])
        for start in example.starts[1:]:
            labels[row, start - 1] = IGNORED
            positions[row, start:] -= positions[row, start].clone()
    if examples[0].label is not None:
        return Batch(tokens, torch.tensor([e.label for e in examples]), mask=mask)
    together = any(len(e.starts) > 1 for e in examples)
    return Batch(tokens, labels, positions if together else None)
