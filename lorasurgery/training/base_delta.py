"""What Delta-LoRA has moved W by, as a file: λ s (B A - B₀ A₀) under the names of the base's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapters import delta_lora
from lorasurgery.dialects._one_file import write as write_file
from lorasurgery.tensors import TensorInfo
from lorasurgery.training.adapted import turned
from lorasurgery.training.written import array

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.training.adapted import Adapted


def write(file: Path, layers: Mapping[str, Adapted], names: Mapping[str, str]) -> None:
    """One weight in memory at a time."""
    tensors = {}
    for path, layer in layers.items():
        shape = len(layer.factors["B"]), layer.factors["A"].shape[1]
        info = TensorInfo(names[path], "F32", shape[::-1] if turned(layer.base) else shape)
        tensors[info.name] = info, _moved(layer)
    write_file(file, tensors, {"format": "pt"})


def _moved(layer: Adapted) -> Callable[[], Array]:
    def load() -> Array:
        held = {name: array(f).astype(np.float64) for name, f in layer.given.items()}
        s = delta_lora.strength(layer.config) * layer.config.scaling
        moved = s * (held["B"] @ held["A"] - held["B0"] @ held["A0"])
        return np.ascontiguousarray(moved.T if turned(layer.base) else moved, np.float32)

    return load
