"""lorasurgery diff: what sets two adapters or two models apart, and which adapters a model holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasurgery.cli._options import AllowUnmatched, Printing
from lorasurgery.cli._print import emit
from lorasurgery.cli._progress import progress_bar
from lorasurgery.cli._report import as_json, rows_of
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.report import Report
    from lorasurgery.surgery import RunOptions


def command(
    paths: Annotated[
        list[str], typer.Argument(help="Two adapters or two models; with --inside, adapters.")
    ],
    inside: Annotated[
        str | None, typer.Option("--inside", metavar="MODEL", help="Which adapters does it hold?")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="What --inside was made of, or what adapters' changes depend on.",
        ),
    ] = None,
    allow_unmatched: AllowUnmatched = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Threads; 0 takes every processor.")
    ] = 0,
    *,
    printing: Printing,
) -> None:
    """Say how two adapters or two models differ, or which adapters are inside a model.

    Differences are relative to the first. Angles are the smallest between two adapters' subspaces, in degrees.
    With --inside, a coefficient of 1 says merged once, 0 not at all.

    Example:

        lorasurgery diff lora-a lora-b
    """
    from lorasurgery.surgery import RunOptions

    with progress_bar(quiet=printing.quiet) as progress:
        how = RunOptions(threads=jobs, progress=progress)
        report = _report(paths, (inside, base), tuple(allow_unmatched or ()), how)
    emit(as_json(report, None), lambda: "\n".join(rows_of(report, printing)), printing)


def _report(
    paths: list[str],
    models: tuple[str | None, str | None],
    allowed: tuple[str, ...],
    how: RunOptions,
) -> Report:
    from lorasurgery.model import resolve
    from lorasurgery.operations.diff import diff
    from lorasurgery.operations.inside import inside

    model, base = models
    if model is not None and base is not None:
        return inside(resolve(model), resolve(base), paths, allowed, how)
    if model is not None:
        raise UsageError("diff: --inside MODEL needs what it was made of. Pass --base DIR.")
    if len(paths) != 2:
        raise UsageError(f"diff: compares two, not {len(paths)}. Pass two adapters or two models.")
    of = resolve(base) if base is not None else None
    return diff(resolve(paths[0]), resolve(paths[1]), allowed, how, of)
