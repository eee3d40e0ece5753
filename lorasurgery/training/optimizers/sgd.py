"""Plain gradient descent, without momentum: p ← (1 - η·decay) p - η g."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasurgery.training.method import Group
from lorasurgery.training.optimizer import Settings, as_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer


def make(groups: Sequence[Group], settings: Settings) -> Optimizer:  # noqa: ARG001 - no moments
    """Over the groups, in their order."""
    import torch

    return torch.optim.SGD(as_groups(groups))
