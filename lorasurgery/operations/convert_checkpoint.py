"""Rewrite a checkpoint: GGUF, .bin or safetensors in, sharded safetensors out, in any float dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorasurgery import plugins
from lorasurgery.arrays import NUMPY, Array
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.model import Model, open_model
from lorasurgery.surgery import (
    Edit,
    Metrics,
    Plan,
    Report,
    Result,
    RunOptions,
    Step,
    copy_edit,
    rehearse,
    run,
)
from lorasurgery.tensors import DTYPE_NAMES, FLOATS, TensorInfo


def convert_checkpoint(
    source: Path, output: Path | None, dtype: str | None, how: RunOptions
) -> Report:
    """Write `source` as a Hugging Face directory.

    dtype: a key of BITS, or None for each tensor's own, except that decoded GGUF weights
    become bfloat16 (their own is float32, eight times the file).
    """
    model = open_model(source)
    decoded = any(model.stored.storage(n)[0] not in NUMPY for n in model.stored)
    kind = dtype or ("BF16" if decoded else None)
    edits = tuple(cast_edit(model.stored, n, kind) for n in model.stored)
    plan = Plan(
        "convert-checkpoint",
        {"source": source},
        {"dtype": kind},
        edits,
        _files(model, kind),
        cast_total,
        notes=_remarks(model),
    )
    return run(plan, output, how) if output else rehearse(plan, how)


def cast_edit(source: Checkpoint, name: str, dtype: str | None) -> Edit:
    """A float tensor in another dtype, with the error of the rounding; anything else is copied."""
    info = source.info(name)
    if info.dtype not in FLOATS or dtype in (None, info.dtype):
        return copy_edit(source, name)
    assert dtype is not None
    target = TensorInfo(name, dtype, info.shape)

    def apply(step: Step) -> Metrics:
        error2 = norm2 = 0.0
        for _, tile in step.tiles(source, name):
            cast = tile.astype(NUMPY[dtype])
            step.append(name, cast)
            was = tile.astype(np.float32, copy=False)
            error2 += square(cast.astype(np.float32) - was)
            norm2 += square(was)
        return {"error2": error2, "norm2": norm2, "relative_error": ratio(error2, norm2)}

    return Edit(name, (target,), apply)


def cast_total(results: tuple[Result, ...]) -> Mapping[str, float]:
    """The relative error over all tensors whose dtype changed."""
    error2 = sum(r.metrics["error2"] for r in results)
    norm2 = sum(r.metrics["norm2"] for r in results)
    return {"tensors": len(results), "relative_error": ratio(error2, norm2)}


def square(x: Array) -> float:
    """The sum of squares of float32 values."""
    flat = x.reshape(-1)
    return float(np.dot(flat, flat))


def ratio(error2: float, norm2: float) -> float:
    """||error|| / ||whole||, 0 for nothing at all."""
    return math.sqrt(error2 / norm2) if norm2 else 0.0


def _remarks(model: Model) -> tuple[str, ...]:
    """What a GGUF header cannot say, so that the directory lacks it."""
    if model.stored.path.suffix != ".gguf":
        return ()
    return tuple(plugins.load("formats", "gguf").remarks(model.stored))


def _files(model: Model, dtype: str | None) -> dict[str, bytes | Path]:
    """The side files: the directory's own, or rebuilt from what a GGUF header says."""
    names = {code: name for name, code in DTYPE_NAMES.items()}
    config = dict(model.config)
    if dtype:
        config |= {key: names[dtype] for key in ("dtype", "torch_dtype") if key in config}
    files = model.with_config(config)
    if model.stored.path.suffix != ".gguf":
        return files
    gguf = plugins.load("formats", "gguf")
    return {**gguf.side_files(model.stored, names.get(dtype or "")), **files}
