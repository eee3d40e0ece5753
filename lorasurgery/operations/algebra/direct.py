"""Ways between two variants that do not lead through LoRA: a module that has `from_NAME` makes them, exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Site
from lorasurgery.arrays import Array
from lorasurgery.tensors import TensorInfo

# of every variant, and no other's names
_PROTOCOL = ("lora", "delta")


def way(source: str, target: str) -> Callable[..., Any] | None:
    """What makes factors of `target` of W, factors and config of `source`, or None."""
    module = plugins.load("adapters", target)
    return None if source in _PROTOCOL else getattr(module, f"from_{source}", None)


def directly(site: Site, target: str, w: Array) -> Site | None:
    """The site as `target`, with the same rank and alpha; None where its factors are not of that kind."""
    make = way(site.config.variant, target)
    factors = make(w, site.load(), site.config) if make else None
    if factors is None:
        return None
    held = {name: np.ascontiguousarray(f, np.float32) for name, f in factors.items()}
    infos = {name: TensorInfo(name, "F32", f.shape) for name, f in held.items()}
    config = replace(site.config, variant=target)
    return replace(site, config=config, factors=infos, load=lambda: held)
