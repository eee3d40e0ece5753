"""The verify command: that a merged model is the base plus the adapters, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasurgery.cli._options import AllowUnmatched, Printing
from lorasurgery.cli._print import emit, pairs, table
from lorasurgery.cli._progress import progress_bar
from lorasurgery.operations.inspecting.folding import Fold, fold

if TYPE_CHECKING:
    from lorasurgery.operations.verify import Verification
    from lorasurgery.operations.verifying.check import Finding

_NUMBERS = ("rho", "noise", "expected", "inside", "outside")


def command(
    merged: Annotated[str, typer.Argument(help="The merged model: directory, file or hub id.")],
    base: Annotated[str, typer.Option("--base", help="What it was merged from.")],
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", help="What was merged in; PATH:0.5 weighs it; repeatable."),
    ],
    min_retained: Annotated[
        float | None,
        typer.Option(
            "--min-retained",
            show_default="0.9 for quantized weights",
            help="Exit with code 3 where less of the change is there.",
        ),
    ] = None,
    allow_unmatched: AllowUnmatched = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", metavar="FILE", help="Of ONNX files: YAML of module: initializer or node."
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Threads; 0 takes every processor.")
    ] = 0,
    *,
    printing: Printing,
) -> None:
    """Check what a merged model holds of its adapters.

    Exit code 3 if it is not the base plus the adapters and nothing else. rho is how often the adapter's change is there: 1 is right, 0 is missing. noise is all that it
    was not meant to be, in units of the change; expected is what rounding explains of it.

    Example:

        lorasurgery verify merged --base org/model --adapter my-lora
    """
    from lorasurgery.export._onnx_modules import read_map
    from lorasurgery.model import resolve
    from lorasurgery.operations.verify import VerifyOptions, insist, verify

    with progress_bar(quiet=printing.quiet) as progress:
        allowed, names = tuple(allow_unmatched or ()), read_map(map_file) if map_file else {}
        options = VerifyOptions(min_retained, allowed, jobs, progress, names)
        found = verify(resolve(merged), resolve(base), adapter, options)
    emit(_facts(found), lambda: _text(found, printing), printing)
    insist(found)


def _facts(found: Verification) -> dict[str, Any]:
    """Everything, by tensor and in total."""
    return {
        "operation": "verify",
        "holds": found.holds,
        "merged": str(found.merged),
        "base": str(found.base),
        "adapters": list(found.adapters),
        "seconds": round(found.seconds, 3),
        "min_retained": found.min_retained,
        "total": dict(found.total),
        "notes": list(found.notes),
        "tensors": {f.tensor: {k: v for k, v in asdict(f).items() if k != "tensor"} for f in found.findings},
    }  # fmt: skip


def _text(found: Verification, printing: Printing) -> str:
    """A row for each layer pattern (with -v each tensor), every tensor that does not hold, the total."""
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    shown = [f for f in found.findings if f.role != "untouched"]
    folds = (
        [Fold(f.tensor, (f,)) for f in shown]
        if printing.verbose
        else fold(shown, lambda f: f.tensor, lambda f: (f.role, f.holds, f.rounding))
    )
    blocks = [_rows(folds), [f"{f.tensor}: {f.cause}" for f in found.wrong], _totals(found)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _rows(folds: Sequence[Fold[Finding]]) -> list[str]:
    if not folds:
        return []
    head = ["tensor", "", "", *_NUMBERS, ""]
    return table([head, *(_row(fold) for fold in folds)])


def _row(fold: Fold[Finding]) -> list[str]:
    first, count = fold.members[0], len(fold.members)
    numbers = [_span([getattr(f, name) for f in fold.members]) for name in _NUMBERS]
    verdict = "holds" if first.holds else "WRONG"
    return [fold.name, f"x{count}" if count > 1 else "", first.role, *numbers, verdict]


def _span(values: Sequence[float | None]) -> str:
    """The lowest and the highest, where they can be told apart."""
    there = [v for v in values if v is not None]
    if not there:
        return ""
    low, high = f"{min(there):.3f}", f"{max(there):.3f}"
    return low if low == high else f"{low}..{high}"


def _totals(found: Verification) -> list[str]:
    total = found.total
    untouched = [f for f in found.findings if f.role == "untouched"]
    same = sum(f.holds for f in untouched)
    return pairs([
        ("retained", f"{total['retained']:.3f}"),
        ("noise", f"{total['noise']:.3f}"),
        ("untouched", f"{same} of {len(untouched)} tensors are the base's, byte for byte"),
        ("verdict", f"{'holds' if found.holds else 'DOES NOT HOLD'}, in {found.seconds:.1f} s"),
    ])  # fmt: skip
