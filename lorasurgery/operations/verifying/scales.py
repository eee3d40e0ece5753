"""What makes a change so many times as large: mistakes in alpha, rank, weight and count."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasurgery.target import Target

_COUNTS = {
    "missing: the adapter is not in it": 0.0, "subtracted instead of added": -1.0,
    "merged twice": 2.0, "merged three times": 3.0, "merged four times": 4.0,
}  # fmt: skip


def scale_cause(
    target: Target, settings: Sequence[Mapping[str, Any]], rho: float, sigma: float
) -> str:
    """Every mistake that gives this rho with these adapters' numbers; empty if none does."""
    tried = {**_COUNTS, **dict(_scales(target, settings))}
    off, value = min((abs(rho - value), value) for value in tried.values())
    # rounding to 16 bits bends rho by some hundredths where the change is small
    if off > max(0.05 * abs(value), 0.02, 4 * sigma):
        return ""
    return ", or ".join(cause for cause, v in tried.items() if math.isclose(v, value, abs_tol=1e-9))


def _scales(target: Target, settings: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Only where one rank, alpha and weight made the whole change."""
    numbers = {
        (s.site.config.rank, s.site.config.alpha, s.site.config.rank_stabilized, s.weight)
        for s in target.shares
    }
    if len(numbers) != 1:
        return
    ((r, alpha, stabilized, weight),) = numbers
    root = math.sqrt(r)
    scale = alpha / (root if stabilized else r)
    if not scale * weight:
        return
    made = [
        ("scaled by alpha / r, not by rsLoRA's alpha / sqrt(r)", 1 / root)
        if stabilized
        else ("scaled by alpha / sqrt(r) as if it were rsLoRA, not by alpha / r", root),
        (f"the scale {scale:.4g} was left out", 1 / scale),
        (f"the scale {scale:.4g} was applied twice", scale),
        (f"alpha {alpha:g} was left out", 1 / alpha),
        (f"the division by {'sqrt(r)' if stabilized else 'r'} was left out", alpha / scale),
        (f"the weight {weight:g} was left out", 1 / weight),
        (f"the weight {weight:g} was applied twice", weight),
    ]
    for config in settings:
        common = config.get("lora_alpha", 0) / (
            (config.get("r") or 1) ** (0.5 if stabilized else 1)
        )
        made.append(
            ("the adapter's common alpha and r were taken, not this module's", common / scale)
        )
    # what is no mistake here: a factor of 1
    yield from ((cause, value) for cause, value in made if abs(value - 1) > 0.02)
