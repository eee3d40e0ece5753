"""torch's AdamW: Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasurgery.training.method import Group
from lorasurgery.training.optimizer import Settings, as_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer


def make(groups: Sequence[Group], settings: Settings) -> Optimizer:
    """Over the groups, in their order."""
    import torch

    return torch.optim.AdamW(as_groups(groups), betas=settings.betas, eps=settings.eps)
