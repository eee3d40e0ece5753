"""lorasurgery convert: an adapter as another variant, or as a runtime wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from lorasurgery.cli._print import emit, table
from lorasurgery.cli._report import carry_out
from lorasurgery.cli._sizes import ranks
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.algebra.lattice import Way


def command(
    adapter: Annotated[
        str | None, typer.Argument(help="An adapter: directory, file or hub id.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="VARIANT", help="What it becomes. [default: lora]"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="As vllm, llamacpp, ort ... reads it, not --to a variant.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="DIR", help="The model that the adapter is for.")
    ] = None,
    rank: Rank = None,
    energy: Energy = None,
    exact: Annotated[
        bool,
        typer.Option("--exact", help="A whole SVD, not one from random directions (fixed seed)."),
    ] = False,
    bake_scale: Annotated[
        bool, typer.Option("--bake-scale", help="alpha = rank, the scale in B.")
    ] = False,
    uniform_rank: Annotated[
        bool,
        typer.Option(
            "--uniform-rank", help="One rank for all modules, with zeros; bakes the scale."
        ),
    ] = False,
    ranks_allowed: RanksAllowed = None,
    projections: Annotated[
        str | None,
        typer.Option(
            "--projections",
            metavar="split|fused",
            help="qkv as q, k, v and gate_up as gate, up, or together; no --to keeps the variant.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            "--experts",
            metavar="single|stacked",
            help="A module for each expert, or transformers 5's parameters with all of them.",
        ),
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print what can become what, and how exactly.")
    ] = False,
    allow_unmatched: AllowUnmatched = None,
    *,
    calibrating: Calibrating,
    writing: WritingAdapter,
    printing: Printing,
) -> None:
    """Write an adapter as another variant, exactly where that can be, with its error where not.

    Example:

        lorasurgery convert my-dora --base org/model -o my-lora --to lora --rank 32
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.algebra.adapter_output import AdapterFormat
    from lorasurgery.operations.algebra.lattice import lattice
    from lorasurgery.operations.algebra.nearest import Aim
    from lorasurgery.operations.convert import ConvertOptions, convert
    from lorasurgery.operations.convert_for import FitOptions, convert_for
    from lorasurgery.operations.layouts.layout import Layout
    from lorasurgery.tensors import DTYPE_NAMES

    if explain:
        ways = lattice()
        emit({"operation": "explain", "ways": _facts(ways)}, lambda: _text(ways), printing)
        return
    if adapter is None:
        raise UsageError("ADAPTER: is missing. Name one, or pass --explain.")
    form = AdapterFormat(writing.dialect, DTYPE_NAMES[writing.dtype])
    source, allowed = resolve(adapter), tuple(allow_unmatched or ())
    if runtime:
        ranked = rank or energy or bake_scale or uniform_rank or ranks_allowed
        if writing.dialect or ranked or projections or experts or calibrating.calibrate:
            raise UsageError(
                "--for: decides on ranks, scale and layout itself. Take the others away."
            )
        fitting = FitOptions(runtime, resolve(base) if base else None, allowed, form)
        carry_out(
            lambda output, how: convert_for(source, output, fitting, how), writing.run, printing
        )
        return
    layout = Layout(projections, experts)
    options = ConvertOptions(
        to=to or ("" if layout.asked else "lora"),
        layout=layout,
        base=resolve(base) if base else None,
        aim=Aim(rank, energy, exact),
        folded=bake_scale,
        uniform=uniform_rank,
        allowed_ranks=ranks(ranks_allowed),
        allowed=allowed,
        form=form,
        calibration=calibrating.calibration,
    )
    carry_out(lambda output, how: convert(source, output, options, how), writing.run, printing)


def _facts(ways: list[Way]) -> dict[str, dict[str, str]]:
    return {way.variant: {"to_lora": way.to_lora, "from_lora": way.from_lora} for way in ways}


def _text(ways: list[Way]) -> str:
    """A line for each variant."""
    rows = [
        ["variant", "to lora", "from lora"],
        *([w.variant, w.to_lora, w.from_lora] for w in ways),
    ]
    return "\n".join([*table(rows), "", "One variant becomes another by way of lora."])
