"""lorasurgery extract: the adapter that turns a base into its fine-tuned model."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasurgery.cli._options import (
    Base,
    Energy,
    Exclude,
    Include,
    Printing,
    Rank,
    WritingAdapter,
)
from lorasurgery.cli._report import carry_out


def command(
    base: Base,
    finetuned: Annotated[str, typer.Argument(help="What was made of it, whole.")],
    rank: Rank = None,
    energy: Energy = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A whole SVD, not one from random directions (fixed seed)."),
    ] = False,
    save_others: Annotated[
        bool,
        typer.Option("--save-others", help="Keep what has no low rank whole, as modules_to_save."),
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    *,
    writing: WritingAdapter,
    printing: Printing,
) -> None:
    """Find the LoRA in a fine-tuned model, and say what it does not hold.

    Without --rank and --energy, ranks are 16. With both, the energy is sought up to that rank.

    Example:

        lorasurgery extract org/model tuned -o adapter --rank 32
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.algebra.adapter_output import AdapterFormat
    from lorasurgery.operations.algebra.nearest import Aim
    from lorasurgery.operations.extract import ExtractOptions, extract
    from lorasurgery.tensors import DTYPE_NAMES

    options = ExtractOptions(
        Aim(16 if rank is None and energy is None else rank, energy, exact),
        base,
        save_others,
        tuple(include or ()),
        tuple(exclude or ()),
        AdapterFormat(writing.dialect, DTYPE_NAMES[writing.dtype]),
    )
    old, new = resolve(base), resolve(finetuned)
    carry_out(lambda output, how: extract(old, new, output, options, how), writing.run, printing)
