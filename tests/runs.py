"""A made checkpoint and a plan for it: float32 matrices to bfloat16, the rest copied."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.numpy

from lorasurgery.checkpoint import MANIFEST, open_checkpoint
from lorasurgery.edit import Edit, Metrics, Step
from lorasurgery.operations.convert_checkpoint import cast_edit
from lorasurgery.output import OutputOptions
from lorasurgery.surgery import Plan, RunOptions

NAMES = [f"layer.{i}.weight" for i in range(8)]


def make(folder: Path, rows: int = 40, names: list[str] = NAMES) -> Path:
    """A checkpoint of float32 matrices, all different, with two that are copied."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal((rows + i, 64), np.float32) for i, n in enumerate(names)}
    tensors["ids"] = np.arange(100, dtype=np.int64)
    tensors["mask"] = np.ones((3, 3), np.uint8)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return folder


def plan_of(source: Path, applied: list[str] | None = None, **changes: object) -> Plan:
    """float32 to bfloat16; `applied` notes each edit that is really carried out."""
    checkpoint = open_checkpoint(source)
    edits = []
    for name in checkpoint:
        edit = cast_edit(checkpoint, name, "BF16")
        edits.append(edit if applied is None else replace(edit, apply=noting(edit, applied)))
    plan = Plan(
        "test", {"base": source}, {"dtype": "BF16"}, tuple(edits),
        {"config.json": source / "config.json", "sub/note.txt": b"note"},
        lambda results: {"tensors": len(results)},
    )  # fmt: skip
    return replace(plan, **changes)


def noting(edit: Edit, applied: list[str]) -> Callable[[Step], Metrics]:
    def apply(step: Step) -> Metrics:
        applied.append(edit.name)
        return edit.apply(step)

    return apply


def options(threads: int = 1, tile: int | None = 1 << 10, **output: object) -> RunOptions:
    return RunOptions(
        OutputOptions(**output), max_memory=tile and 8 * threads * tile, threads=threads
    )


RESUME, SHARDED = options(resume=True), 40_000


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a directory with their bytes; of the manifest all but the time it took."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        manifest.pop("seconds")
        found[MANIFEST] = json.dumps(manifest).encode()
    return found


def left(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())
