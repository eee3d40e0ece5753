"""The reports of an export's steps as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lorasurgery.report import Report


def joined(steps: Sequence[Report]) -> Report:
    """What each step did, one after another; the last tells of the file."""
    total: dict[str, float] = {}
    for step in steps:
        total |= {k: v for k, v in step.total.items() if k != "others"}
    notes = tuple(note for step in steps for note in step.notes)
    if len(steps) == 1:
        results = steps[0].results
    else:  # a weight that is merged and then quantized has both its numbers
        merged = {_module(r.name): r for r in steps[0].results}
        last = {_module(r.name): r for r in steps[-1].results}
        results = tuple(
            replace(r, metrics={**merged[name].metrics, **r.metrics}) if name in merged else r
            for name, r in last.items()
        )
        # q, k and v that became one matrix
        results += tuple(r for name, r in merged.items() if name not in last)
    return Report("export", results, 0.0, total, notes)


def _module(name: str) -> str:
    return name.partition(" <- ")[0].removesuffix(".weight")
