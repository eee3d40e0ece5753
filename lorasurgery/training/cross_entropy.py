"""Cross-entropy of logits, a few rows at a time: neither their probabilities nor their float32 are ever whole.

It is torch's, in float32: what it keeps for the backward pass are the logits in their own dtype and one number a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorasurgery.training.examples import IGNORED

_AT_ONCE = 1 << 20  # logits: their float32 stays in the caches


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Float32, in nats, over the rows that have a label.

    Args:
        logits: floats [rows, classes].
        labels: int64 [rows]; IGNORED for a row that has none.

    """
    return cast(Tensor, _Summed.apply(logits, labels))  # type: ignore[no-untyped-call]


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        logs = torch.empty(len(logits), device=logits.device)  # of the sum of exponentials
        for part, wide in _parts(logits):
            largest = logits[part].amax(-1, keepdim=True).float()
            torch.sub(logits[part], largest, out=wide).exp_()
            logs[part] = wide.sum(-1).log_().add_(largest[:, 0])
        ctx.save_for_backward(logits, labels, logs)
        has = labels != IGNORED
        own = logits.gather(1, torch.where(has, labels, 0)[:, None])[:, 0]
        return torch.where(has, logs - own, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Probabilities, less 1 at the label."""
        logits, labels, logs = ctx.saved_tensors
        result = torch.empty_like(logits)
        has = labels != IGNORED
        label = torch.where(has, labels, 0)[:, None]
        by = torch.where(has, gradient, 0.0)[:, None]
        for part, wide in _parts(logits):
            torch.sub(logits[part], logs[part, None], out=wide).exp_()
            wide.scatter_add_(1, label[part], torch.full_like(logs[part, None], -1.0)).mul_(
                by[part]
            )
            result[part] = wide
        return result, None


def _parts(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows, and float32 [rows, classes] to work in."""
    rows, classes = logits.shape
    step = max(1, _AT_ONCE // max(1, classes))
    room = torch.empty(min(step, rows), classes, device=logits.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        yield part, room[: part.stop - part.start]
