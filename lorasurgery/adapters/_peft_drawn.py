"""What some of PEFT's types draw for a whole model, in the order in which its modules stand.

That order is in no file: transformers builds the model anew from its config.json, without its weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import MatchError

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def layers(
    config: Mapping[str, Any], targeted: Callable[[str], bool]
) -> dict[str, tuple[int, int]]:
    """A model's targeted layers in their order, and their [out, in]. Raises MatchError."""
    import torch

    named = (config.get("architectures") or [None])[0]
    library: Any = importlib.import_module("transformers")
    built = getattr(library, str(named), None)
    if built is None:
        raise MatchError(
            f"config.json: architectures {config.get('architectures')!r} names no model of "
            "transformers, whose modules' order tells what was drawn for each. Restore the base's config.json."
        )
    with torch.device("meta"):
        model = built(built.config_class.from_dict(dict(config)))
    found = {}
    for path, module in model.named_modules():
        if targeted(path) and hasattr(module, "weight") and module.weight.ndim == 2:
            turned = type(module).__name__ == "Conv1D"
            rows, columns = module.weight.shape
            found[path] = (columns, rows) if turned else (rows, columns)
    return found


def unilora(settings: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> Callable[[], Any]:
    """What gives each module's factors beside theta_d: indices and scales, drawn once for all."""
    rank, length = int(settings["r"]), int(settings["theta_d_length"])
    shapes = {
        f"{path}.{letter}": (rank, in_) if letter == "A" else (out, rank)
        for path, (out, in_) in sizes.items()
        for letter in "AB"
    }

    @cache
    def drawn() -> dict[str, dict[str, Array]]:
        import numpy as np

        tuner: Any = importlib.import_module("peft.tuners.unilora.model").UniLoraModel
        ends = np.cumsum([rows * columns for rows, columns in shapes.values()])
        found = tuner.generate_index(int(ends[-1]), length, int(settings["proj_seed"])).numpy()
        # each entry of theta_d is divided by the root of how often it is used
        counts = np.bincount(found, minlength=length)
        scales = (1 / np.sqrt(np.maximum(counts, 1, dtype=np.float32))).astype(np.float32)
        of: dict[str, dict[str, Array]] = {path: {} for path in sizes}
        for (name, shape), part in zip(shapes.items(), np.split(found, ends[:-1]), strict=True):
            path, _, letter = name.rpartition(".")
            of[path][f"unilora_indices_{letter}"] = part.reshape(shape)
            of[path][f"unilora_scales_{letter}"] = scales[part].reshape(shape)
        return of

    return drawn


def tinylora_group(settings: Mapping[str, Any], modules: Sequence[str], module: str) -> int:
    """Which of the vectors a module has: as many groups as weight_tying leaves, one after another."""
    n = len(modules)
    groups = max(1, round(n * (1 - float(settings.get("weight_tying") or 0))))
    return min(modules.index(module) // max(1, n // groups), groups - 1)
