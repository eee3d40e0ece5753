"""rsLoRA: LoRA scaled by alpha / √r, so that the size of what it learns does not shrink with the rank.

Kalajdzievski 2023, arXiv 2312.03732, §3.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods.lora import (
    RATE,
    TRAINED,
    VARIANT,
    Options,
    config_of,
    groups,
    hooks,
    start,
)

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """Stabilized, whether it was asked for or not."""
    return config_of(VARIANT, replace(wanted, rank_stabilized=True))
