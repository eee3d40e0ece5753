"""What the learning rate is multiplied by: a linear rise over the warm-up, then constant, linear or cosine.

Loshchilov & Hutter 2017, arXiv 1608.03983, eq. 5, without restarts. The first step already moves.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

Schedule: TypeAlias = Literal["constant", "linear", "cosine"]


def factor(step: int, steps: int, warmup: int, schedule: Schedule) -> float:
    """Of step 1 to steps; 1 at the end of the warm-up, and never 0 but after the last step."""
    if step <= warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup - 1) / max(1, steps - warmup)
    return 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
