"""Rewrite a checkpoint: GGUF, .bin or safetensors in, sharded safetensors out, in any float dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lorasurgery import plugins
from lorasurgery.arrays import NUMPY, Array
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.errors import ValueRangeError
from lorasurgery.formats._writer import Shard, lay_out
from lorasurgery.model import Model, open_model, with_dtype
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
from lorasurgery.tensors import BITS, DTYPE_NAMES, FLOATS, TensorInfo


def convert_checkpoint(
    source: Path, output: Path | None, dtype: str | None, how: RunOptions
) -> Report:
    """Write `source` as a Hugging Face directory.

    dtype: a float dtype of BITS, or None for each tensor's own, except that decoded GGUF weights
    become bfloat16 (their own is float32, eight times the file).
    """
    model = open_model(source)
    decoded = any(model.stored.storage(n)[0] not in BITS for n in model.stored)
    kind = dtype or ("BF16" if decoded else None)
    kept = packed_parts(model)
    edits = tuple(cast_edit(model.stored, n, None if n in kept else kind) for n in model.stored)
    plan = Plan(
        "convert-checkpoint",
        {"source": source},
        {"dtype": kind},
        edits,
        _files(model, kind),
        cast_total,
        shards=_adapter_file(model, edits),
        notes=(*_left_packed(model, kept, kind), *_remarks(model)),
    )
    return run(plan, output, how) if output else rehearse(plan, how)


def _adapter_file(model: Model, edits: tuple[Edit, ...]) -> tuple[Shard, ...] | None:
    """The one file in which PEFT looks for an adapter's weights; None for a model."""
    if not model.stored.path.name.startswith("adapter_model."):
        return None
    infos = [info for edit in edits for info in edit.targets]
    (shard,) = lay_out(infos, 1 << 62, {"format": "pt"})
    return (replace(shard, file="adapter_model.safetensors"),)


# what quantized weights are packed in; integers of 16 bits and more are that in GPTQ and AWQ alone
_CODES = tuple(code for code, bits in BITS.items() if bits <= 8 and code != "BOOL")
_WORDS = ("I16", "U16", "I32", "U32", "I64", "U64")


def packed_parts(model: Model) -> set[str]:
    """Every stored tensor that belongs to a packed weight: codes, scales, and unknown companions.

    To cast a scale to fewer bits would change all weights of its block.
    """
    known = {part.name for p in model.weights.packed.values() for part in p.parts.values()}
    method = model.config.get("quantization_config") or {"quant_method": "bitsandbytes"}
    words = isinstance(method, dict) and method.get("quant_method") != "bitsandbytes"
    codes = (*_CODES, *_WORDS) if words else _CODES
    rest = [n for n in model.stored if n not in known]
    modules = {_module(n) for n in rest if model.stored.info(n).dtype in codes}
    return known | {n for n in rest if _module(n) in modules}


def _module(name: str) -> str:
    return name.rpartition(".")[0] or name


def cast_edit(source: Checkpoint, name: str, dtype: str | None) -> Edit:
    """A float tensor in another dtype, with the error of the rounding; anything else is copied."""
    info = source.info(name)
    if info.dtype not in (*FLOATS, "F64") or dtype in (None, info.dtype):
        return copy_edit(source, name)
    assert dtype is not None
    target = TensorInfo(name, dtype, info.shape)
    wide = NUMPY["F64" if "F64" in (dtype, info.dtype) else "F32"]

    def apply(step: Step) -> Metrics:
        error2 = norm2 = 0.0
        for _, tile in step.tiles(source, name):
            cast = _cast(name, tile, dtype)
            step.append(name, cast)
            e, n = _error(tile.astype(wide, copy=False), cast.astype(wide, copy=False))
            error2, norm2 = error2 + e, norm2 + n
        return {"error2": error2, "norm2": norm2, "relative_error": ratio(error2, norm2)}

    return Edit(name, (target,), apply)


def _error(was: Array, now: Array) -> tuple[float, float]:
    """The sums of squares of the difference and of what was; nan and inf stay, and have no error."""
    with np.errstate(over="ignore", invalid="ignore"):
        error2, norm2 = square(now - was), square(was)
    if math.isfinite(norm2):
        return error2, norm2
    finite = np.isfinite(was)
    was, now = was[finite].astype(np.float64), now[finite].astype(np.float64)
    return square(now - was), square(was)


def _cast(name: str, tile: Array, dtype: str) -> Array:
    """A tile in another dtype; raises ValueRangeError where a finite weight would become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = tile.astype(NUMPY[dtype])
    if not np.isfinite(cast).all():
        lost = np.isinf(cast) & np.isfinite(tile)
        if lost.any():
            largest = float(np.abs(tile[lost].astype(np.float64)).max())
            raise ValueRangeError(
                f"{name}: {largest:.6g} does not fit into {dtype}. Choose another --dtype."
            )
    return cast


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


def _left_packed(model: Model, kept: set[str], kind: str | None) -> tuple[str, ...]:
    unlike = sum(model.stored.info(n).dtype != kind for n in kept)
    if not kind or not unlike:
        return ()
    return (f"{unlike} tensors of quantized weights are copied as they are, not cast to {kind}",)


def _remarks(model: Model) -> tuple[str, ...]:
    """What a GGUF header cannot say, so that the directory lacks it."""
    if model.stored.path.suffix != ".gguf":
        return ()
    return tuple(plugins.load("formats", "gguf").remarks(model.stored))


def _files(model: Model, dtype: str | None) -> dict[str, bytes | Path]:
    """The side files: the directory's own, or rebuilt from what a GGUF header says."""
    names = {code: name for name, code in DTYPE_NAMES.items()}
    files = model.with_config(with_dtype(model.config, dtype))
    if model.stored.path.suffix != ".gguf":
        return files
    gguf = plugins.load("formats", "gguf")
    return {**gguf.side_files(model.stored, names.get(dtype or "")), **files}
