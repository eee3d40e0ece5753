"""lorasurgery convert: an adapter as another variant, or as a runtime wants it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

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
from lorasurgery.cli._sizes import ranks, shares
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.algebra.lattice import Way

Mixing = Literal["mean", "top", "experts"]


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
    mixture: Annotated[
        Mixing | None,
        typer.Option(
            "--mixture",
            help="Of a MoRAL: gates fixed at their means, its top expert, or a LoRA each; see --calibrate.",
        ),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(
            "--init", metavar="DIR", help="A PiSSA, OLoRA, CorDA as it was before training."
        ),
    ] = None,
    residual: Annotated[
        str | None,
        typer.Option(
            "--residual", metavar="DIR", help="The model left of the base, which training saw."
        ),
    ] = None,
    gates: Annotated[
        str | None,
        typer.Option(
            "--gates",
            metavar="G1,...,GN",
            show_default="measured with --calibrate, or those recorded",
            help="The mean gates, or uniform.",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, show_default="2", help="--to moral: chosen for a token."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", show_default="0", help="Of VeRA's projections, MoRAL's router."),
    ] = None,
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
            metavar="single|stacked|N",
            help="A module an expert, or transformers 5's stacks; --to moral: of N, all alike.",
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
    from lorasurgery.operations.algebra.convert_options import ConvertOptions
    from lorasurgery.operations.algebra.into import Chosen
    from lorasurgery.operations.algebra.lattice import lattice
    from lorasurgery.operations.algebra.mixture import Mixture
    from lorasurgery.operations.algebra.nearest import Aim
    from lorasurgery.operations.algebra.started import Start
    from lorasurgery.operations.convert import convert
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
        given = (energy, bake_scale, uniform_rank, ranks_allowed, projections, experts)
        others = (mixture, gates, init, residual, calibrating.calibrate)
        if writing.dialect or any((*given, *others)):
            raise UsageError(
                "--for: decides on ranks, scale and layout itself. Take the others away."
            )
        fitting = FitOptions(runtime, resolve(base) if base else None, allowed, form, rank)
        carry_out(
            lambda output, how: convert_for(source, output, fitting, how), writing.run, printing
        )
        return
    many = int(experts) if experts and experts.isdecimal() else None
    layout = Layout(projections, experts if many is None else None)
    options = ConvertOptions(
        to=to or ("" if layout.asked else "lora"),
        layout=layout,
        base=resolve(base) if base else None,
        aim=Aim(rank, energy, exact),
        mixture=Mixture(
            mixture, None if gates in (None, "uniform") else shares(gates), gates == "uniform"
        ),
        start=Start(resolve(init) if init else None, resolve(residual) if residual else None),
        chosen=Chosen(experts=many, top_k=top_k, seed=seed),
        folded=bake_scale,
        uniform=uniform_rank,
        allowed_ranks=ranks(ranks_allowed),
        allowed=allowed,
        form=form,
        calibration=calibrating.calibration,
    )
    carry_out(lambda output, how: convert(source, output, options, how), writing.run, printing)


def _facts(ways: list[Way]) -> dict[str, dict[str, str]]:
    return {
        way.variant: {
            "to_lora": way.to_lora, "from_lora": way.from_lora,
            **{f"from_{name}": "exact, of the base" for name in way.straight},
        } for way in ways
    }  # fmt: skip


def _text(ways: list[Way]) -> str:
    """A line for each variant."""
    rows = [
        ["variant", "to lora", "from lora"],
        *([w.variant, w.to_lora, w.from_lora] for w in ways),
    ]
    straight = ", ".join(f"{name} becomes {w.variant}" for w in ways for name in w.straight)
    after = (
        f"One variant becomes another by way of lora; {straight} without it, exactly. Of a start that took "
        "something out of the base (CorDA, LoftQ), --init or --residual tells what."
    )
    return "\n".join([*table(rows), "", after])
