"""A small LoRA beside a requantized weight: the best rank-k part of what requantization lost.

The SVD of the loss, truncated (Eckart and Young 1936), in PEFT's layout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import Change, LowRank
from lorasurgery.checkpoint import SCRATCH
from lorasurgery.formats import safetensors
from lorasurgery.operations.algebra.svd import of_matrix
from lorasurgery.operations.merging.retained import Sums
from lorasurgery.operations.undoing.undo_record import file_name
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.edit import Step

FOLDER = "residual_adapter"
_SCRATCH = "residual"
_ROWS = 64  # that are multiplied out at a time


def save_residual(step: Step, name: str, lost: Array, rank: int) -> LowRank:
    """Factors of the lost float32 [rows, columns], kept beside the output until it is complete."""
    a, b = factors(lost, rank)
    if step.scratch is not None:
        folder = step.scratch / _SCRATCH
        folder.mkdir(exist_ok=True)
        np.savez(folder / f"{file_name(name)}.npz", a=a, b=b)
    return LowRank(a[None], b[None])


def factors(lost: Array, rank: int) -> tuple[Array, Array]:
    """A [rank, columns] and B [rows, rank] with B A nearest to `lost`; float32, always the same."""
    return of_matrix(lost, rank).factors(min(rank, *lost.shape))


def with_residual(sums: Sums, residual: LowRank, lost: Array, change: Change) -> Sums:
    """What weights and residual R hold together: of <made, D> there is <R, D> more, and L - R is lost, not L."""
    a, b = (factor[0].astype(np.float64) for factor in (residual.a, residual.b))
    of_change = of_lost = 0.0
    for start in range(0, len(lost), _ROWS):
        here = slice(start, start + _ROWS)
        [(_, piece)] = change.tiles(start, min(start + _ROWS, len(lost)))
        made = b[here] @ a
        of_change += float(np.vdot(made, piece.rows()))
        of_lost += float(np.vdot(made, lost[here]))
    power = float(((b.T @ b) * (a @ a.T)).sum())
    noise2 = max(0.0, sums.noise2 - 2 * of_lost + power)
    return Sums(sums.signal + of_change, sums.power, noise2)


def write_adapter(partial: Path, names: Iterable[str], rank: int, task: str | None) -> None:
    """residual_adapter/ with adapter_config.json and adapter_model.safetensors, from what was kept."""
    folder, scratch = partial / FOLDER, partial / SCRATCH / _SCRATCH
    folder.mkdir(exist_ok=True)
    arrays: dict[str, Array] = {}
    modules, smaller = [], {}
    for name in names:
        module = name.removesuffix(".weight")
        modules.append(module)
        with np.load(scratch / f"{file_name(name)}.npz") as kept:
            arrays[f"base_model.model.{module}.lora_A.weight"] = kept["a"]
            arrays[f"base_model.model.{module}.lora_B.weight"] = kept["b"]
            if len(kept["a"]) < rank:
                smaller[module] = len(kept["a"])
    infos = [TensorInfo(key, "F32", array.shape) for key, array in arrays.items()]
    header = safetensors.header_of(infos, {"format": "pt"})
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for array in arrays.values():
            file.write(array.tobytes())
    config = {
        "peft_type": "LORA", "task_type": task, "base_model_name_or_path": None,
        "r": rank, "lora_alpha": rank, "target_modules": modules, "lora_dropout": 0.0,
        "bias": "none", "inference_mode": True,
        "rank_pattern": smaller, "alpha_pattern": smaller,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
