"""DoRA: LoRA on the direction of each row of W, and a trained magnitude m for it.

Liu et al. 2024, arXiv 2402.09353, §4.
"""

from __future__ import annotations

from typing import Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods.lora import RATE, Options, config_of, groups, hooks, start

__all__ = ["RATE", "TRAINED", "VARIANT", "Options", "configure", "groups", "hooks", "start"]

VARIANT = "dora"
TRAINED = ("A", "B", "m")


def configure(wanted: Wanted, options: Any) -> AdapterConfig:
    """As LoRA."""
    return config_of(VARIANT, wanted)
