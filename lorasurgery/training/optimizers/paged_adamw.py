"""AdamW with moments in pages: at most --state-budget bytes of them in memory, the rest on disk or with the host.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; updates are torch's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorasurgery.training.method import Group
from lorasurgery.training.optimizer import Settings, as_groups

if TYPE_CHECKING:
    from torch.optim import Optimizer

BUDGETED = True


def make(groups: Sequence[Group], settings: Settings) -> Optimizer:
    """Over the groups, in their order."""
    from lorasurgery.training.paging.adamw import PagedAdamW

    return PagedAdamW(as_groups(groups), settings.betas, settings.eps, settings.budget)
