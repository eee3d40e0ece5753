"""A model directory of Hugging Face's kind, in 16 or 32 bits or bitsandbytes' NF4, with PEFT adapters beside it."""

from __future__ import annotations

import os
from pathlib import Path

from lorasurgery.checkpoint import MANIFEST
from lorasurgery.errors import UsageError
from lorasurgery.export._beside import check_beside, write_beside
from lorasurgery.export._steps import joined
from lorasurgery.export._target import ExportOptions, Made
from lorasurgery.model import Model, open_model
from lorasurgery.operations.convert_checkpoint import convert_checkpoint
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.quantize import QuantizeOptions, plan_quantize, quantize
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions

_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def check_directory(model: Model, runtime: str, options: ExportOptions) -> None:
    """Raise before anything is made."""
    if options.weights in ("int4", "int8"):
        raise UsageError(
            f"--weights {options.weights}: is written as ONNX alone. Pass nf4, bf16, fp16 or fp32."
        )
    if not model.config:
        raise UsageError(
            f"{model.path}: has no config.json, without which {options.to} loads nothing. Name a model "
            "directory; `convert-checkpoint` makes one of a GGUF file."
        )
    packed = bool(model.weights.packed)
    if _merged(options) and packed and options.weights in ("auto", "nf4"):
        raise UsageError(
            f"--merge-adapters: {model.path} is NF4, and rounding to the same grid again would take the "
            "adapters away. Pass --weights bf16, leave them beside it, or `merge` with --requantize."
        )
    if options.weights == "nf4" and not packed:
        plan_quantize(model, QuantizeOptions())
    if options.as_inputs:
        check_beside(model, runtime, options)


def make_directory(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    """Write the model into `target`, and its adapters into `target`/adapters."""
    steps: list[Report] = []
    source, last = model, scratch / "base"
    if _merged(options):
        dtype = _DTYPES.get(options.weights)
        # NF4 is made of what was not rounded before
        dtype = "F32" if options.weights == "nf4" else dtype
        into = scratch / "merged" if options.weights == "nf4" else last
        merging = MergeOptions(dtype=dtype, allowed=options.allowed)
        steps.append(merge(model.path, options.adapters, into, merging, how))
        source = open_model(into)
    if not last.exists():
        steps.append(_written(source, last, options, how))
    for file in last.iterdir():
        if file.name != MANIFEST:
            os.replace(file, target / file.name)
    if options.as_inputs:
        steps.insert(0, write_beside(model, scratch, target, options, how))
    return Made(joined(steps), {})


def _merged(options: ExportOptions) -> bool:
    return bool(options.adapters) and not options.as_inputs


def _written(model: Model, path: Path, options: ExportOptions, how: RunOptions) -> Report:
    packed = bool(model.weights.packed)
    if options.weights == "nf4" and not packed:
        return quantize(model.path, path, QuantizeOptions(), how)
    dtype = _DTYPES.get(options.weights)
    if packed and dtype:
        return dequantize(model.path, path, dtype, how)
    return convert_checkpoint(model.path, path, dtype, how)
