"""lorasurgery merge: adapters into a base, 16-bit or NF4."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import (
    AllowUnmatched,
    Base,
    DeviceName,
    Dtype,
    Printing,
    Writing,
    refuse_flags,
)
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError

Tied = Literal["auto", "shared", "untie", "refuse"]
Policy = Literal["rtn", "keep-absmax", "stochastic", "from-original", "residual"]


def command(
    base: Base,
    adapter: Annotated[
        list[str],
        typer.Argument(help="Adapters: directories or hub ids; PATH:0.5 weighs one by a half."),
    ],
    base_view: Annotated[
        Literal["dequantized", "original"],
        typer.Option("--base-view", help="Of an NF4 base: its own weights, or --original's."),
    ] = "dequantized",
    original: Annotated[
        str | None, typer.Option("--original", metavar="DIR", help="What the NF4 base was made of.")
    ] = None,
    requantize: Annotated[
        Policy | None, typer.Option("--requantize", help="Write NF4 again, by this policy.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the residual adapter.")] = 16,
    rounding: Annotated[
        Literal["nearest", "stochastic"], typer.Option("--rounding", help="Of 16-bit outputs.")
    ] = "nearest",
    seed: Annotated[int | None, typer.Option("--seed", help="Of what is left to chance.")] = None,
    min_retained: Annotated[
        float | None,
        typer.Option(
            "--min-retained",
            show_default="0.9 with --requantize",
            help="Stop with exit code 3 where less of the change is kept.",
        ),
    ] = None,
    tied: Annotated[
        Tied, typer.Option("--tied", help="A head tied to the embedding: what becomes of the pair.")
    ] = "auto",
    undo: Annotated[
        Path | None,
        typer.Option("--undo", metavar="FILE", help="Write what brings the base back exactly."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw what was kept, layer by layer."),
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", metavar="FILE", help="Of an ONNX base: YAML of module: initializer or node."
        ),
    ] = None,
    dtype: Dtype = "auto",
    allow_unmatched: AllowUnmatched = None,
    device: DeviceName = "cpu",
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Add adapters to a base, and say what was kept of them.

    Example:

        lorasurgery merge org/model my-lora -o merged --undo merged.undo
        lorasurgery merge model.onnx my-lora -o merged.onnx
    """
    from lorasurgery.device import opened
    from lorasurgery.model import resolve
    from lorasurgery.operations.inspecting.picture import Scale, check_file, heat_map
    from lorasurgery.operations.merge import advice, check, merge
    from lorasurgery.operations.merging.edits import Rounding
    from lorasurgery.operations.merging.options import MergeOptions
    from lorasurgery.tensors import DTYPE_NAMES

    if rounding == "stochastic" and seed is None:
        raise UsageError("--rounding stochastic: needs --seed N, so that it can be repeated.")
    by_chance = "stochastic" in (rounding, requantize)
    where = opened(device)  # before anything is downloaded
    source = resolve(base)
    if source.suffix == ".onnx":
        from lorasurgery.export._onnx_modules import read_map
        from lorasurgery.operations.merge_onnx import OnnxMergeOptions, merge_onnx

        foreign = {
            "--base-view": base_view != "dequantized", "--original": original,
            "--requantize": requantize, "--tied": tied != "auto", "--plot": plot,
            "--dtype": dtype != "auto", "--device": device != "cpu",
        }  # fmt: skip
        refuse_flags(source, writing, foreign)
        onnx = OnnxMergeOptions(
            read_map(map_file) if map_file else {},
            tuple(allow_unmatched or ()),
            Rounding(seed if by_chance else None),
            min_retained,
            undo=undo,
        )
        carry_out(
            lambda output, how: merge_onnx(source, adapter, output, onnx, how), writing, printing
        )
        return
    if map_file:
        raise UsageError(f"--map: needs an ONNX file, and {source} is none. Take it away.")
    options = MergeOptions(
        dtype=DTYPE_NAMES.get(dtype),
        tied=tied,
        allowed=tuple(allow_unmatched or ()),
        view=base_view,
        original=resolve(original) if original else None,
        policy=requantize,
        rank=rank,
        rounding=Rounding(seed if by_chance else None),
        min_retained=min_retained,
        undo=undo,
    )
    if plot:
        check_file(plot)
    report = carry_out(
        lambda output, how: merge(source, adapter, output, options, how),
        writing,
        printing,
        device=where,
    )
    if plot:
        kept = {r.name: r.metrics["retained"] for r in report.results if "retained" in r.metrics}
        ends = min(0.9, *kept.values(), 1.0), max(1.0, *kept.values(), 1.0)
        heat_map(plot, kept, Scale("retained signal", *ends))
    if warning := advice(report, options):
        typer.echo(f"warning: {warning}", err=True)
    check(report, options)  # a run has passed it, a rehearsal has not
