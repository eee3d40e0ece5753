"""ONNX, for onnxruntime and onnxruntime-genai: the graph by others' exporters, then the surgery on it.

Encoders go through torch's exporter, and adapters are merged into the graph's initializers; decoders through
onnxruntime-genai's builder, and adapters are merged into the checkpoint that it reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorasurgery.errors import LoraSurgeryError, UsageError
from lorasurgery.export._onnx_adapter_files import check_adapters, write_adapters
from lorasurgery.export._onnx_adapters import Placed, add_inputs, check_factors, place
from lorasurgery.export._onnx_decoder import Build, build_decoder, check_decoder, fuses
from lorasurgery.export._onnx_edit import open_for_surgery
from lorasurgery.export._onnx_encoder import ENCODERS, check_encoder, export_encoder
from lorasurgery.export._onnx_half import halve
from lorasurgery.export._onnx_standard import spell_out
from lorasurgery.export._target import ExportOptions, Made
from lorasurgery.model import Model, open_model
from lorasurgery.operations._onnx_output import Deed, deliver
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merge_onnx import OnnxMergeOptions, merge_onnx
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.quantize_onnx import quantize_onnx
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions

FILE, EXPORTED = "model.onnx", "exported.onnx"
_OTHERS = f"encoders ({', '.join(ENCODERS)})"


def check(model: Model, options: ExportOptions) -> None:
    """Raise before anything is made: a strange architecture, a missing extra, a bad block size."""
    if _is_encoder(model):
        check_encoder(model)
        if options.provider != "cpu":
            raise UsageError(
                f"--provider {options.provider}: belongs to decoders, and {model.path} is an encoder, "
                "whose graph runs on any. Take it away."
            )
    else:
        check_decoder(model, _OTHERS)
    if options.quantize:
        options.quantize.scheme  # noqa: B018 - raises for a block size that its operator lacks
    if options.as_inputs and not options.adapters:
        raise UsageError("--adapters-as-inputs: there are none. Name some with --adapter.")
    if options.as_inputs:
        check_factors(options.adapters)
    merged = options.adapters and not options.as_inputs
    if options.weights == "nf4" and merged and model.weights.packed:
        raise UsageError(
            f"--weights nf4: {model.path} is NF4 already, and rounding to the same grid again would take "
            "the merged adapters away. Export the model it was made of, pass --weights int8 or "
            "--adapters-as-inputs, or merge with --requantize before."
        )


def make(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    """Write model.onnx, and what belongs beside it, into `target`."""
    try:
        if _is_encoder(model):
            return _encoder(model, scratch, target, options, how)
        return _decoder(model, scratch, target, options, how)
    except LoraSurgeryError as error:
        # what has no place in the graph has none in the model
        message = str(error)
        for made in (scratch / EXPORTED, scratch / "graph" / FILE, scratch / "plain"):
            message = message.replace(str(made), str(model.path))
        raise type(error)(message) from None


def _is_encoder(model: Model) -> bool:
    return model.config.get("model_type") in ENCODERS


def _encoder(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    plain, exported = model.path, scratch / EXPORTED
    if model.weights.packed:
        plain = scratch / "plain"
        dequantize(model.path, plain, "F32", how)
    export_encoder(plain, exported, "float16" if options.weights == "fp16" else "float32")
    steps: list[Report] = []
    last, placed = exported, None
    if options.as_inputs:
        last = scratch / "adapted.onnx"
        placed = _with_inputs(exported, last, options, how)
    elif options.adapters:
        last = target / FILE if options.quantize is None else scratch / "merged.onnx"
        merging = OnnxMergeOptions(allowed=options.allowed)
        steps.append(merge_onnx(exported, options.adapters, last, merging, how))
    if options.quantize is not None:
        steps.append(quantize_onnx(last, target / FILE, options.quantize, how))
    if not steps:
        steps.append(_rewritten(last, target / FILE, how))
    if placed:
        write_adapters(placed, target)
        steps.insert(0, check_adapters(placed, target / FILE, plain))
    return Made(_joined(steps), _side_files(plain))


def _decoder(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    plain, graph, placed = model.path, scratch / "graph", None
    steps: list[Report] = []
    if options.adapters and not options.as_inputs:
        plain = scratch / "plain"
        merging = MergeOptions(dtype="F32", allowed=options.allowed)
        steps.append(merge(model.path, options.adapters, plain, merging, how))
    elif model.weights.packed:
        plain = scratch / "plain"
        dequantize(model.path, plain, "F32", how)
    build_decoder(plain, graph, _build(model, options))
    last = graph / FILE
    if options.as_inputs:
        last = scratch / "adapted.onnx"
        placed = _with_inputs(graph / FILE, last, options, how)
    if options.quantize is not None:
        standard = replace(options.quantize, standard=True)
        steps.append(quantize_onnx(last, target / FILE, standard, how))
    else:
        half = options.weights == "fp16" and options.provider == "cpu"
        steps.append(_rewritten(last, target / FILE, how, half=half))
    for file in graph.iterdir():
        if not file.name.startswith(FILE):
            os.replace(file, target / file.name)
    if placed:
        write_adapters(placed, target)
        steps.insert(0, check_adapters(placed, target / FILE, target))
    return Made(_joined(steps), _side_files(plain))


def _build(model: Model, options: ExportOptions) -> Build:
    """Other providers' kernels take float16; NF4's blocks must be those of q, k and v alone."""
    half = options.provider != "cpu" and options.weights != "fp32"
    scheme = options.quantize.scheme if options.quantize else None
    block = scheme.attributes(1, 1)["block_size"] if scheme and options.weights == "nf4" else 1
    fused = not options.as_inputs and fuses(model.config, block)
    return Build("fp16" if half else "fp32", options.provider, fused)


def _with_inputs(source: Path, target: Path, options: ExportOptions, how: RunOptions) -> Placed:
    """The graph with the adapters' factors as inputs."""
    edited = open_for_surgery(source)
    placed = place(edited, options.adapters, options.allowed)
    add_inputs(edited, placed.inputs)
    deliver(edited, target, how, Deed(lambda _: Report("export", (), 0.0, {}), {}, {}))
    return placed


def _side_files(folder: Path) -> dict[str, Path]:
    """What travels along, but for other exports."""
    files = open_model(folder).files
    return {name: f for name, f in files.items() if not name.startswith(("onnx/", "openvino/"))}


def _rewritten(source: Path, target: Path, how: RunOptions, *, half: bool = False) -> Report:
    """The same model, its data where this package puts it; `half` stores matrices as float16."""
    edited = open_for_surgery(source)
    spell_out(edited)
    if half:
        halve(edited)

    def report(nbytes: int) -> Report:
        return Report("export", (), 0.0, {"tensors": len(edited.file), "bytes": float(nbytes)})

    return deliver(edited, target, how, Deed(report, {}, {"base": source}))


def _joined(steps: Sequence[Report]) -> Report:
    """What each step did, one after another; the last tells of the file."""
    total: dict[str, float] = {}
    for step in steps:
        total |= {k: v for k, v in step.total.items() if k != "others"}
    notes = tuple(note for step in steps for note in step.notes)
    if len(steps) == 1:
        results = steps[0].results
    else:  # a weight that is merged and then quantized has both its numbers
        merged = {r.name.partition(" <- ")[0].removesuffix(".weight"): r for r in steps[0].results}
        last = {r.name: r for r in steps[-1].results}
        results = tuple(
            replace(r, metrics={**merged[name].metrics, **r.metrics}) if name in merged else r
            for name, r in last.items()
        )
        # q, k and v that became one matrix
        results += tuple(r for name, r in merged.items() if name not in last)
    return Report("export", results, 0.0, total, notes)
