"""lorasurgery prune: an adapter at smaller ranks, set by one budget over all of its modules."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import (
    AllowUnmatched,
    Calibrating,
    Energy,
    Printing,
    Rank,
    RanksAllowed,
    WritingAdapter,
)
from lorasurgery.cli._report import carry_out
from lorasurgery.cli._sizes import count, is_size, ranks, size


def command(
    adapter: Annotated[str, typer.Argument(help="An adapter: directory, file or hub id.")],
    rank: Rank = None,
    energy: Energy = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="N|SIZE", help="Parameters (2.5M) or bytes (40MiB) for all factors."
        ),
    ] = None,
    ranks_allowed: RanksAllowed = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="Count each change relative to this weight's norm, or run this on --calibrate TEXT.",
        ),
    ] = None,
    by: Annotated[
        Literal["change", "base", "activations"] | None,
        typer.Option(
            "--by",
            show_default="base with --base, or change",
            help="A rank counts by its energy, by that relative to the base's, or by that of outputs.",
        ),
    ] = None,
    drop: Annotated[
        float | None,
        typer.Option(
            "--drop",
            metavar="SHARE",
            help="LoRA-drop: the fewest modules with this share of importance keep factors of their own.",
        ),
    ] = None,
    drop_over: Annotated[
        Literal["group", "all"],
        typer.Option("--drop-over", help="The share of each kind and size of module, or of all."),
    ] = "group",
    dropped: Annotated[
        Literal["share", "remove"],
        typer.Option("--dropped", help="The others share a pair for each group, or go."),
    ] = "share",
    allow_unmatched: AllowUnmatched = None,
    *,
    calibrating: Calibrating,
    writing: WritingAdapter,
    printing: Printing,
) -> None:
    """Cut an adapter's ranks down to what counts, and say what was lost.

    Singular values of all modules compete: each module ends with a rank of its own, or without one.
    With --drop, modules compete: by what they do to outputs on --calibrate TEXT.

    Example:

        lorasurgery prune my-lora -o smaller --budget 10MiB
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.algebra.adapter_output import AdapterFormat
    from lorasurgery.operations.algebra.drop import DropOptions
    from lorasurgery.operations.prune import PruneOptions, prune
    from lorasurgery.tensors import DTYPE_NAMES

    in_bytes = budget is not None and is_size(budget)
    options = PruneOptions(
        rank=rank,
        energy=energy,
        parameters=None if budget is None or in_bytes else count(budget),
        size=size(budget) if budget and in_bytes else None,
        allowed_ranks=ranks(ranks_allowed),
        base=resolve(base) if base else None,
        allowed=tuple(allow_unmatched or ()),
        form=AdapterFormat(writing.dialect, DTYPE_NAMES[writing.dtype]),
        by=by,
        calibration=calibrating.calibration,
        drop=None if drop is None else DropOptions(drop, drop_over, dropped),
    )
    source = resolve(adapter)
    carry_out(lambda output, how: prune(source, output, options, how), writing.run, printing)
