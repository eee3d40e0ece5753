"""lorasurgery combine: one adapter of several."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import AllowUnmatched, Printing, Rank, WritingAdapter
from lorasurgery.cli._report import carry_out

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]


def command(
    adapter: Annotated[
        list[str],
        typer.Argument(
            help="Adapters: directories or hub ids; PATH:-0.5 takes a half of one away."
        ),
    ],
    method: Annotated[
        Method, typer.Option("--method", help="What is made of the changes.")
    ] = "linear",
    density: Annotated[
        float | None,
        typer.Option(
            "--density", show_default="0.5", help="The share of elements that the method keeps."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="DIR",
            help="Their model, where a layout needs its sizes or a change its weights.",
        ),
    ] = None,
    rank: Rank = None,
    seed: Annotated[int, typer.Option("--seed", help="Of what DARE leaves to chance.")] = 0,
    allow_unmatched: AllowUnmatched = None,
    *,
    writing: WritingAdapter,
    printing: Printing,
) -> None:
    """Make one adapter of several, and say how they get in each other's way.

    Changes are combined, not factors; linear is exact unless --rank cuts it. Angles are the smallest between
    the subspaces of two adapters, in degrees.

    Example:

        lorasurgery combine style:0.7 facts:0.5 -o both --method ties
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.algebra.adapter_output import AdapterFormat
    from lorasurgery.operations.combine import CombineOptions, combine
    from lorasurgery.tensors import DTYPE_NAMES

    options = CombineOptions(
        method, density, rank, seed, resolve(base) if base else None, tuple(allow_unmatched or ()),
        AdapterFormat(writing.dialect, DTYPE_NAMES[writing.dtype]),
    )  # fmt: skip
    carry_out(lambda output, how: combine(adapter, output, options, how), writing.run, printing)
