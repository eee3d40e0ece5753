"""Export a model directory to what a runtime loads: the graph, then the surgery on it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lorasurgery.checkpoint import MANIFEST, SCRATCH
from lorasurgery.errors import LoraSurgeryError
from lorasurgery.export._onnx_edit import open_for_surgery
from lorasurgery.export._onnx_encoder import check_encoder, export_encoder
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_output import Deed, deliver
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.operations.merge_onnx import OnnxMergeOptions, merge_onnx
from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions, quantize_onnx
from lorasurgery.output import Output, OutputOptions
from lorasurgery.place import check_apart, check_free, recover, writing
from lorasurgery.report import Report, manifest
from lorasurgery.surgery import RunOptions

FILE, EXPORTED = "model.onnx", "exported.onnx"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """`quantize` says how, for nf4 and int4; adapters are merged before."""

    weights: Literal["fp32", "fp16", "nf4", "int4"] = "fp32"
    adapters: tuple[str, ...] = ()
    allowed: tuple[str, ...] = ()
    quantize: OnnxQuantizeOptions | None = None
    to: Literal["onnx"] = "onnx"

    @property
    def settings(self) -> dict[str, object]:
        how = self.quantize.settings if self.quantize else {}
        return {**how, "to": self.to, "weights": self.weights, "adapters": list(self.adapters)}


def export(base: Path, output: Path | None, options: ExportOptions, how: RunOptions) -> Report:
    """Write OUT/model.onnx and what belongs beside it; with no output, only compute the report.

    Raises FormatError for an architecture that is not exported, UsageError where an extra is missing.
    """
    started = time.perf_counter()
    model = open_model(base)
    check_encoder(model)
    inputs = {"base": base}
    inputs |= {
        f"adapter {i}": a.path for i, (a, _) in enumerate(open_adapters(options.adapters), 1)
    }
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            return replace(
                _make(model, Path(scratch), options, how), seconds=time.perf_counter() - started
            )
    check_apart(output, inputs.values())
    with writing(output, "the output"):
        recover(output)
    check_free(output, overwrite=how.output.overwrite)
    opened = Output(output, (), "export", OutputOptions(overwrite=how.output.overwrite))
    scratch_folder = opened.partial / SCRATCH
    try:
        scratch_folder.mkdir()
        report = _make(model, scratch_folder, options, how)
        for file in scratch_folder.glob(f"{FILE}*"):
            if not file.name.endswith(".surgery.json"):
                os.replace(file, opened.partial / file.name)
        report = replace(report, seconds=time.perf_counter() - started)
        files = {k: v for k, v in model.files.items() if not k.startswith(("onnx/", "openvino/"))}
        content = manifest(report, "", options.settings, inputs)
        opened.commit({**files, MANIFEST: content})
    except LoraSurgeryError as error:
        opened.abandon()
        # what has no place in the graph has none in the model
        message = str(error).replace(str(scratch_folder / EXPORTED), str(base))
        raise type(error)(message) from None
    except BaseException:
        opened.abandon()
        raise
    return report


def _make(model: Model, folder: Path, options: ExportOptions, how: RunOptions) -> Report:
    """FILE in this folder, through the steps that the options ask for."""
    plain, exported = model.path, folder / EXPORTED
    how = replace(how, output=OutputOptions())
    if model.weights.packed:
        plain = folder / "dequantized"
        dequantize(model.path, plain, "F32", how)
    export_encoder(plain, exported, "float16" if options.weights == "fp16" else "float32")
    steps: list[Report] = []
    last = exported
    if options.adapters:
        last = folder / (FILE if options.quantize is None else "merged.onnx")
        merging = OnnxMergeOptions(allowed=options.allowed)
        steps.append(merge_onnx(exported, options.adapters, last, merging, how))
    if options.quantize is not None:
        steps.append(quantize_onnx(last, folder / FILE, options.quantize, how))
    if not steps:
        steps.append(_rewritten(exported, folder / FILE, how))
    return _joined(steps)


def _rewritten(source: Path, target: Path, how: RunOptions) -> Report:
    """The same model, its data where this package puts it."""
    edited = open_for_surgery(source)

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
        merged = {r.name.partition(" <- ")[0]: r for r in steps[0].results}
        results = tuple(
            replace(r, metrics={**merged[r.name].metrics, **r.metrics}) if r.name in merged else r
            for r in steps[-1].results
        )
    return Report("export", results, 0.0, total, notes)
