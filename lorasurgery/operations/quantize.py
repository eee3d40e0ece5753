"""Quantize: W -> NF4 codes and scales, one weight at a time, with the error of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.codec import Codec, CodecOptions, Packed, Rule
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.kernels import nf4_error
from lorasurgery.layouts import is_conv1d
from lorasurgery.model import Model, linear_weights, matches, open_model
from lorasurgery.operations._transposed import Transposed
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
from lorasurgery.weights import codec_of

CODEC = "nf4"


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """What to quantize and how; `include` and `exclude` are globs over tensor names."""

    codec: CodecOptions = field(default_factory=CodecOptions)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def quantize(base: Path, output: Path | None, options: QuantizeOptions, how: RunOptions) -> Report:
    """Write `base` with its linear weights in NF4; with no output, only compute the report."""
    plan = plan_quantize(open_model(base), options)
    return run(plan, output, how) if output else rehearse(plan, how)


def plan_quantize(model: Model, options: QuantizeOptions) -> Plan:
    """Raises MatchError if nothing would be quantized, FormatError if all of it is already."""
    if model.weights.packed:
        first = next(iter(model.weights.packed.values()))
        raise FormatError(
            f"{model.path}: {first.info.name} is {first.state['quant_type']} already. "
            "Run `lorasurgery dequantize` first."
        )
    for pattern in (*options.include, *options.exclude):
        if not any(matches(name, [pattern]) for name in model.weights):
            raise MatchError(
                f"{model.path}: no tensor matches {pattern!r}. See `lorasurgery inspect`."
            )
    chosen = dict.fromkeys(linear_weights(model, options.include, options.exclude))
    if not chosen:
        raise MatchError(
            f"{model.path}: none of its {len(model.weights)} tensors is a linear weight. "
            "Name some with --include."
        )
    codec = codec_of(CODEC)
    conv1d = {n for n in chosen if is_conv1d(model.config, n)}
    source = Transposed(model.weights, conv1d)
    packed = {n: codec.parts(source.info(n), options.codec) for n in chosen}
    edits = [
        quantize_edit(source, codec, packed[n]) if n in chosen else copy_edit(model.stored, n)
        for n in model.weights
    ]
    return Plan(
        "quantize", {"base": model.path}, _settings(options), tuple(edits),
        model.with_config(_config(model, codec, options, packed)),
        lambda results: _total(results, edits, model),
    )  # fmt: skip


def quantize_edit(source: Checkpoint, codec: Codec, packed: Packed) -> Edit:
    """Encode by tiles, seal the scales, then measure what was written against what was read."""

    def apply(step: Step) -> Metrics:
        placed = replace(packed, device=step.device)
        codes, absmax = [], []
        multiple, row = codec.multiple(packed), packed.info.numel // packed.info.shape[0]
        for start, tile in step.tiles(source, packed.info.name, multiple):
            tile_codes, tile_absmax = codec.encode(
                tile.reshape(-1), placed, Rule(offset=start * row)
            )
            step.append(packed.codes, tile_codes)
            codes.append(tile_codes)
            absmax.append(tile_absmax)
        sealed, decoded = codec.seal(np.concatenate(absmax), packed)
        for part, data in sealed.items():
            step.append(packed.info.name + part, data)
        return _error(step, source, packed, np.concatenate(codes), decoded)

    return Edit(packed.info.name, tuple(packed.parts.values()), apply)


def _error(
    step: Step, source: Checkpoint, packed: Packed, codes: np.ndarray, absmax: np.ndarray
) -> Metrics:
    """A second pass over the weight, with the scales as they will be decoded."""
    name, block = packed.info.name, int(packed.state["blocksize"])
    row = packed.info.numel // packed.info.shape[0]
    error2 = norm2 = largest = 0.0
    for start, tile in step.tiles(source, name, block):
        begin, end = start * row, start * row + tile.size
        e, w, m = step.device.run(
            nf4_error, tile.reshape(-1), codes[begin // 2 : -(-end // 2)],
            absmax[begin // block : -(-end // block)], block,
        )  # fmt: skip
        error2, norm2, largest = error2 + e, norm2 + w, max(largest, m)
    return {
        "relative_error": math.sqrt(error2 / norm2) if norm2 else 0.0,
        "max_error": largest,
        "error2": error2,
        "norm2": norm2,
        "parameters": packed.info.numel,
        "bits_per_parameter": _bits(packed.parts.values(), packed.info.numel),
    }


def _bits(parts: object, numel: int) -> float:
    return 8 * sum(info.nbytes for info in parts) / max(1, numel)  # type: ignore[attr-defined]


def _total(results: tuple[Result, ...], edits: list[Edit], model: Model) -> dict[str, float]:
    """Errors over all quantized weights; bits per parameter of those and of the whole model."""
    rows = [r.metrics for r in results]
    error2, norm2 = sum(m["error2"] for m in rows), sum(m["norm2"] for m in rows)
    quantized = sum(m["parameters"] for m in rows)
    bits = sum(m["bits_per_parameter"] * m["parameters"] for m in rows)
    nbytes = sum(info.nbytes for edit in edits for info in edit.targets)
    everything = sum(model.weights.info(n).numel for n in model.weights)
    return {
        "tensors": len(rows),
        "relative_error": math.sqrt(error2 / norm2) if norm2 else 0.0,
        "max_error": max(m["max_error"] for m in rows),
        "parameters": everything,
        "quantized_parameters": quantized,
        "bits_per_quantized_parameter": bits / quantized,
        "bits_per_parameter": 8 * nbytes / everything,
        "bytes": nbytes,
    }


def _settings(options: QuantizeOptions) -> dict[str, object]:
    return {
        "codec": CODEC, "block_size": options.codec.block, "double_quant": options.codec.double,
        "include": list(options.include), "exclude": list(options.exclude),
    }  # fmt: skip


def _config(
    model: Model, codec: Codec, options: QuantizeOptions, packed: dict[str, Packed]
) -> dict[str, object]:
    """config.json with the quantization, and the names of linear modules that stay as they are."""
    if not model.config:
        return {}
    dtype = next(iter(packed.values())).info.dtype
    kept = [
        n.removesuffix(".weight") for n in model.weights
        if n.endswith(".weight") and len(model.weights.info(n).shape) == 2 and n not in packed
        and not matches(n, ("*experts*",))
    ]  # fmt: skip
    skipped = sorted({*kept, "lm_head"})
    return {**model.config, "quantization_config": codec.config(options.codec, dtype, skipped)}
