"""GGUF, for llama.cpp: OUT/model.gguf, and each adapter that is not merged as OUT/adapters/NAME.gguf."""

from __future__ import annotations

import json
import os
from pathlib import Path

from lorasurgery.export._beside import check_beside, write_beside
from lorasurgery.export._gguf_plan import (
    FILE,
    plain_config,
    plan_gguf,
)
from lorasurgery.export._steps import joined
from lorasurgery.export._target import ExportOptions, Made
from lorasurgery.model import Model, open_model
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions, run


def check(model: Model, options: ExportOptions) -> None:
    """Raise before anything is made: a strange architecture, or a tokenizer without a name in GGUF."""
    if options.as_inputs:
        check_beside(model, "llamacpp", options)
    plan_gguf(model, options.gguf_type, model.path.name)


def make(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Made:
    """Write model.gguf, and what belongs beside it, into `target`."""
    plain = model
    steps: list[Report] = []
    if options.adapters and not options.as_inputs:
        # rounded once, to what is asked for
        merging = MergeOptions(dtype="F32", allowed=options.allowed)
        steps.append(merge(model.path, options.adapters, scratch / "plain", merging, how))
        plain = open_model(scratch / "plain")
    plan = plan_gguf(plain, options.gguf_type, model.path.name)
    steps.append(run(plan, scratch / "gguf", how))
    os.replace(scratch / "gguf" / FILE, target / FILE)
    if options.as_inputs:
        steps.insert(0, write_beside(model, scratch, target, options, how))
    config = target / "config.json"
    config.write_text(json.dumps(plain_config(plain.config), indent=2) + "\n")
    return Made(joined(steps), plain.files)
