"""lorasurgery unmerge: a merged model back to its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import AllowUnmatched, Printing, Writing
from lorasurgery.cli._report import carry_out


def command(
    merged: Annotated[str, typer.Argument(help="The merged model.")],
    adapter: Annotated[
        list[str], typer.Argument(help="What was merged: the same adapters, weights and order.")
    ],
    undo: Annotated[
        Path | None,
        typer.Option(
            "--undo", metavar="FILE", help="What merge --undo wrote: exact, byte for byte."
        ),
    ] = None,
    tied: Annotated[
        Literal["auto", "shared", "untie"],
        typer.Option("--tied", help="As it was merged; the undo file knows."),
    ] = "auto",
    allow_unmatched: AllowUnmatched = None,
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Take adapters out of a merged model again.

    Byte for byte with the undo file, to rounding without it.

    Example:

        lorasurgery unmerge merged my-lora -o base --undo merged.undo
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.unmerge import UnmergeOptions, unmerge

    source = resolve(merged)
    options = UnmergeOptions(undo, tied, tuple(allow_unmatched or ()))
    carry_out(lambda output, how: unmerge(source, adapter, output, options, how), writing, printing)
