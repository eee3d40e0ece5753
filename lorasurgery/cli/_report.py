"""Run an operation behind a progress bar, and print what it reports: a table, or JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

from lorasurgery.cli._columns import HIDDEN, TOTALS_FIRST, column
from lorasurgery.cli._errors import Interrupted
from lorasurgery.cli._options import Printing, Writing
from lorasurgery.cli._print import emit, pairs, table
from lorasurgery.cli._progress import progress_bar
from lorasurgery.device import HOST, Device
from lorasurgery.errors import UsageError
from lorasurgery.operations.inspecting.folding import Fold, fold

if TYPE_CHECKING:
    from lorasurgery.surgery import Progress, Report, Result, RunOptions

Operation: TypeAlias = "Callable[[Path | None, RunOptions], Report]"
Bar: TypeAlias = "Callable[..., AbstractContextManager[Progress]]"


def carry_out(
    operation: Operation, writing: Writing, printing: Printing, bar: Bar = progress_bar,
    device: Device = HOST,
) -> Report:  # fmt: skip
    """Call the operation with the output (None: a dry run) and how to run; print its report."""
    output = _output(writing)
    if printing.report and not printing.report.parent.is_dir():
        raise UsageError(
            f"--report: there is no directory {printing.report.parent}. Make it first."
        )
    try:
        with bar(quiet=printing.quiet) as progress:
            report = operation(output, _how(writing, progress, device))
    except KeyboardInterrupt:
        raise Interrupted(_left_behind(output)) from None
    except OSError as error:
        # a write by file descriptor does not say where it went
        if error.filename is None and output is not None:
            error.filename = str(output)
        raise
    emit(as_json(report, output), lambda: as_table(report, output, printing), printing)
    return report


def as_json(report: Report, output: Path | None) -> dict[str, Any]:
    """Everything, per tensor and in total."""
    return {
        "operation": report.operation,
        "output": str(output) if output else None,
        "device": report.device,
        "seconds": round(report.seconds, 3),
        "total": dict(report.total),
        "notes": list(report.notes),
        "tensors": {result.name: dict(result.metrics) for result in report.results},
    }


def as_table(report: Report, output: Path | None, printing: Printing) -> str:
    """A row for each layer pattern (with -v each tensor), the totals, and where it went."""
    on = "" if report.device == HOST.name else f" on {report.device}"
    seconds = f"in {report.seconds:.1f} s{on}"
    done = f"wrote {output} {seconds}" if output else f"dry run {seconds}, nothing written"
    return "\n".join([*rows_of(report, printing), done])


def rows_of(report: Report, printing: Printing) -> list[str]:
    """The table and the totals; notes go to stderr."""
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    folds = (
        [Fold(result.name, (result,)) for result in report.results]
        if printing.verbose
        else fold(report.results, lambda r: r.name, lambda r: tuple(r.metrics))
    )
    return [*_rows(folds), *_totals(report.total)]


def _rows(folds: list[Fold[Result]]) -> list[str]:
    metrics = dict.fromkeys(m for f in folds for r in f.members for m in r.metrics)
    shown = [metric for metric in metrics if metric not in HIDDEN]
    if not shown:
        return []
    head = ["tensor", "", *(column(metric).title for metric in shown)]
    body = [
        [f.name, f"x{len(f.members)}" if len(f.members) > 1 else "", *(_cell(f, m) for m in shown)]
        for f in folds
    ]
    return [*table([head, *body]), ""]


def _cell(folded: Fold[Result], metric: str) -> str:
    """The mean of a metric over the fold, and the worst where that is another number."""
    values = [r.metrics[metric] for r in folded.members if metric in r.metrics]
    if not values:
        return ""
    how = column(metric)
    if how.worst is None:
        return how.show(sum(values))
    mean, worst = how.show(sum(values) / len(values)), how.show(how.worst(values))
    return mean if mean == worst else f"{mean} (worst {worst})"


def _totals(total: Mapping[str, float]) -> list[str]:
    first = [name for name in TOTALS_FIRST if name in total]
    names = [*first, *(name for name in total if name not in first and name not in HIDDEN)]
    return pairs([(column(name).title, column(name).show(total[name])) for name in names])


def _output(writing: Writing) -> Path | None:
    if writing.dry_run:
        return None
    if writing.output is None:
        raise UsageError("--output: is missing. Pass -o DIR, or --dry-run for the report alone.")
    if writing.overwrite and writing.resume:
        raise UsageError("--resume: goes on with what --overwrite discards. Pass one of the two.")
    return writing.output


def _how(writing: Writing, progress: Progress, device: Device) -> RunOptions:
    from lorasurgery.output import OutputOptions
    from lorasurgery.surgery import RunOptions

    output = OutputOptions(
        writing.overwrite, writing.resume, writing.durable, writing.max_shard_size
    )
    return RunOptions(output, writing.max_memory, writing.jobs, progress, device)


def _left_behind(output: Path | None) -> str:
    if output is None:
        return "interrupted. Nothing was to be written."
    partial = output.with_name(output.name + ".partial")
    if partial.exists():
        return f"{partial}: interrupted. Repeat the command with --resume to go on."
    return f"{output}: interrupted, and nothing is left behind. Repeat the command."
