"""For transformers: a directory, bitsandbytes NF4 or plain, and adapters in the layout of PEFT."""

from __future__ import annotations

from pathlib import Path

from lorasurgery.export._directory import check_directory, make_directory
from lorasurgery.export._target import ExportOptions, Made
from lorasurgery.model import Model
from lorasurgery.surgery import RunOptions


def check(model: Model, options: ExportOptions) -> None:
    """Raise before anything is made, for what it cannot load."""
    check_directory(model, "peft", options)


def make(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    """Write the model, and its adapters beside it, into `target`."""
    return make_directory(model, scratch, target, options, how)
