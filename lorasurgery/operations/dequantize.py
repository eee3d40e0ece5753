"""Dequantize: packed weights back to 16 or 32 bits, everything else untouched."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.errors import FormatError
from lorasurgery.model import open_model, with_dtype
from lorasurgery.operations.convert_checkpoint import cast_edit, packed_parts
from lorasurgery.surgery import Edit, Metrics, Plan, Report, RunOptions, Step, rehearse, run
from lorasurgery.weights import Weights


def dequantize(source: Path, output: Path | None, dtype: str | None, how: RunOptions) -> Report:
    """Write a quantized directory as a plain one; dtype None keeps the dtype the weights had."""
    model = open_model(source, dtype, how.device)
    if not model.weights.packed:
        raise FormatError(f"{source}: no quantized weight in it. Nothing is to be done.")
    kept = packed_parts(model)

    def edit(name: str) -> Edit:
        if name in model.weights.packed:
            return decode_edit(model.weights, name)
        return cast_edit(model.stored, name, None if name in kept else dtype)

    edits = tuple(edit(name) for name in model.weights)
    config = {k: v for k, v in model.config.items() if k != "quantization_config"}
    config = with_dtype(config, dtype)
    plan = Plan(
        "dequantize", {"source": source}, {"dtype": dtype}, edits, model.with_config(config),
        lambda results: {"tensors": sum("decoded" in r.metrics for r in results)},
    )  # fmt: skip
    return run(plan, output, how) if output else rehearse(plan, how)


def decode_edit(weights: Weights, name: str) -> Edit:
    """One packed weight as it decodes."""

    def apply(step: Step) -> Metrics:
        for _, tile in step.tiles(weights, name):
            step.append(name, tile)
        return {"decoded": weights.info(name).numel}

    return Edit(name, (weights.info(name),), apply)
