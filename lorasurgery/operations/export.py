"""Export a model directory to what a runtime loads: a target makes it, and it gets its place at once."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

from lorasurgery import plugins
from lorasurgery.checkpoint import MANIFEST, SCRATCH
from lorasurgery.export._target import ExportOptions, Made, Target
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.output import Output, OutputOptions
from lorasurgery.place import check_apart, check_free, recover, writing
from lorasurgery.report import Report, manifest
from lorasurgery.surgery import RunOptions


def export(base: Path, output: Path | None, options: ExportOptions, how: RunOptions) -> Report:
    """Write the directory OUT; with no output, only compute the report.

    Raises FormatError for an architecture that is not exported, UsageError where an extra is missing.
    """
    started = time.perf_counter()
    model = open_model(base)
    target = cast(Target, plugins.load("export", options.to))
    target.check(model, options)
    opened = open_adapters(options.adapters)
    inputs = {"base": base} | {f"adapter {i}": a.path for i, (a, _) in enumerate(opened, 1)}
    if output is None:
        with tempfile.TemporaryDirectory() as scratch:
            made = _make(target, model, Path(scratch), options, how)
            return replace(made.report, seconds=time.perf_counter() - started)
    check_apart(output, inputs.values())
    with writing(output, "the output"):
        recover(output)
    check_free(output, overwrite=how.output.overwrite)
    place = Output(output, (), "export", OutputOptions(overwrite=how.output.overwrite))
    scratch_folder = place.partial / SCRATCH
    try:
        scratch_folder.mkdir()
        made = _make(target, model, scratch_folder, options, how)
        for file in _written(scratch_folder):
            os.replace(file, place.partial / file.name)
        report = replace(made.report, seconds=time.perf_counter() - started)
        content = manifest(report, "", options.settings, inputs)
        files = {n: f for n, f in made.files.items() if not (place.partial / n).exists()}
        place.commit({**files, MANIFEST: content})
    except BaseException:
        place.abandon()
        raise
    return report


def _make(
    target: Target, model: Model, scratch: Path, options: ExportOptions, how: RunOptions
) -> Made:
    (scratch / "out").mkdir()
    return target.make(
        model, scratch, scratch / "out", options, replace(how, output=OutputOptions())
    )


def _written(scratch: Path) -> list[Path]:
    """What the target wrote, but for the records of its steps: the output has one of its own."""
    return [f for f in (scratch / "out").iterdir() if not f.name.endswith(".surgery.json")]
