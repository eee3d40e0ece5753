"""LoRA-drop: ΔW = s · B A, of a module's own where it matters, else of a pair that many modules share.

Zhou et al. 2024, arXiv 2402.07721, §3. Which is which, a site says in extra['shared'], the name of the pair;
what it does to W is LoRA's.
"""

from __future__ import annotations

from lorasurgery.adapters.lora import (
    LINEAR_IN_W,
    ROWS,
    delta,
    detour,
    forward,
    from_lora,
    init,
    low_rank,
    shapes,
)

__all__ = [
    "LINEAR_IN_W",
    "ROWS",
    "delta",
    "detour",
    "forward",
    "from_lora",
    "init",
    "low_rank",
    "shapes",
]
