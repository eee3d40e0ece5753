"""What every operation on an ONNX file ends with: the file, and what was done beside it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasurgery.export._onnx_edit import Edited
from lorasurgery.export._onnx_write import write
from lorasurgery.report import Report, manifest
from lorasurgery.surgery import RunOptions


@dataclass(frozen=True, slots=True)
class Deed:
    """What was done. `report` is given the bytes that were written, 0 in a rehearsal."""

    report: Callable[[int], Report]
    settings: Mapping[str, object]
    inputs: Mapping[str, Path]
    check: Callable[[], None] = lambda: None


def deliver(edited: Edited, output: Path | None, how: RunOptions, deed: Deed) -> Report:
    """Write the model and OUT.surgery.json; with no output, only report."""
    if output is None:
        return deed.report(0)
    total = sum(edited.file.storage(name)[1] for name in edited.file)
    finished = 0

    def done(name: str, nbytes: int) -> None:
        nonlocal finished
        finished += nbytes
        how.progress(min(finished, total), total, name)

    found = deed.report(write(edited, output, done, deed.check))
    write_manifest(output, found, deed.settings, deed.inputs)
    return found


def write_manifest(
    output: Path, report: Report, settings: Mapping[str, object], inputs: Mapping[str, Path]
) -> None:
    """OUT.surgery.json."""
    content = manifest(report, "", settings, inputs)
    beside = output.with_name(output.name + ".surgery.json")
    part = beside.with_name(beside.name + ".part")
    part.write_bytes(content)
    os.replace(part, beside)
