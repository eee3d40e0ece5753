"""Merge adapters into a base: W' = round(W + Σ s B A), one tensor at a time, with what was kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorasurgery.adapter import Adapter
from lorasurgery.edit import Edit
from lorasurgery.errors import VerificationError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._right_base import check_base
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.merging.residual import write_adapter
from lorasurgery.operations.merging.retained import total
from lorasurgery.operations.merging.work import Work, lay_upon
from lorasurgery.operations.undoing.undo_file import Undo, adapter_facts, check_target, layout_facts
from lorasurgery.report import Report, Result
from lorasurgery.surgery import Plan, RunOptions, rehearse, run


def merge(
    base: Path, adapters: Sequence[str], output: Path | None, options: MergeOptions, how: RunOptions
) -> Report:
    """Write `base` with the adapters (PATH or PATH:weight) merged in; no output: only the report.

    Raises MatchError for a part that has no place, UsageError for options that do not go together,
    VerificationError, before the output is complete, where less than the threshold was retained;
    a rehearsal leaves that to `check`.
    """
    model = open_model(base, device=how.device)
    plan = plan_merge(model, open_adapters(adapters, model), options)
    if output is None:
        return rehearse(plan, how)
    if options.undo:
        overwrite = how.output.overwrite or how.output.resume
        check_target(options.undo, output, overwrite=overwrite)
    return run(plan, output, how)


def plan_merge(
    model: Model, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> Plan:
    """All edits, from headers alone."""
    work = lay_upon(model, adapters, options)
    check_base(model, work.resolved)
    edits = tuple(work.edits())
    undo = _undo(work, adapters)

    def finish(_: Report, partial: Path) -> None:
        if options.policy == "residual":
            write_adapter(partial, work.requantized, options.rank, _task(adapters))
        if undo:
            undo.assemble(partial)

    inputs = {"base": model.path}
    inputs |= {f"adapter {i}": adapter.path for i, (adapter, _) in enumerate(adapters, 1)}
    if options.original:
        inputs["original"] = options.original
    return Plan(
        "merge", inputs, _settings(adapters, options), edits, work.files(),
        lambda results: _total(results, edits),
        check=lambda report: check(report, options),
        finish=finish,
        publish=undo.publish if undo else lambda: None,
        discard=undo.discard if undo else lambda: None,
        notes=work.notes,
    )  # fmt: skip


def advice(report: Report, options: MergeOptions) -> str | None:
    """A warning where a 16-bit output kept less than it should, and what helps."""
    if options.threshold is None and report.total["retained"] < options.wanted:
        return f"{_shortfall(report)} {_remedy(options)}"
    return None


def check(report: Report, options: MergeOptions) -> None:
    """Raises VerificationError where less than the threshold was retained."""
    if options.threshold is not None and report.total["retained"] < options.threshold:
        raise VerificationError(
            f"{_shortfall(report)} Less than --min-retained {options.threshold:g}: nothing was "
            f"written. {_remedy(options)}"
        )


def _shortfall(report: Report) -> str:
    kept, noise = report.total["retained"], report.total["noise"]
    return (
        f"merge: retained signal is {kept:.3f} (1 is all of the adapter's change), with noise of "
        f"{noise:.2f} times the change."
    )


def _remedy(options: MergeOptions) -> str:
    if options.policy is None:
        return (
            "--dtype float32 keeps all of it; --rounding stochastic --seed 0 keeps it on average."
        )
    better = [p for p in ("residual", "stochastic", "from-original") if p != options.policy]
    return (
        f"--requantize {better[0]} keeps it; so do {better[1]} on average, and 16-bit output (no "
        "--requantize)."
    )


def _total(results: tuple[Result, ...], edits: tuple[Edit, ...]) -> dict[str, float]:
    """Retained signal and noise over all merged tensors, and how many there were of each kind."""
    merged = sum("signal" in r.metrics for r in results)
    replaced = sum("replaced" in r.metrics for r in results)
    counts = {"tensors": merged, "replaced": replaced, "others": len(edits) - len(results)}
    return {**counts, **total(results).metrics()}


def _undo(work: Work, adapters: Sequence[tuple[Adapter, float]]) -> Undo | None:
    path = work.options.undo
    if path is None:
        return None
    kept = work.kept()
    facts = {
        **layout_facts(work.model),
        "adapters": adapter_facts(adapters),
        "tied": "untie" if work.settled.untied else "shared",
    }
    return Undo(
        path,
        tuple(name for k in kept for name in k.differences),
        tuple(name for k in kept for name in k.wholes),
        facts,
    )


def _settings(
    adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> dict[str, object]:
    return {
        "adapters": [f"{adapter.path}:{weight:g}" for adapter, weight in adapters],
        **options.settings,
    }


def _task(adapters: Sequence[tuple[Adapter, float]]) -> str | None:
    task = adapters[0][0].settings.get("task_type")
    return str(task) if task else None


__all__ = ["MergeOptions", "advice", "check", "merge", "plan_merge"]
