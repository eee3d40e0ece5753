"""The export command: a model to what a runtime loads."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import AllowUnmatched, Base, Exclude, Include, Printing, Writing
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError


def command(
    base: Base,
    to: Annotated[Literal["onnx"], typer.Option("--to", help="What to write.")] = "onnx",
    weights: Annotated[
        Literal["fp32", "fp16", "nf4", "int4"],
        typer.Option("--weights", help="nf4 is MatMulBnb4, int4 is MatMulNBits of onnxruntime."),
    ] = "fp32",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="Merged in; PATH:0.5 weighs it; repeatable."),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", show_default="64, of int4 32", help="Weights to a scale."),
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="int4 with a zero point for each block.")
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            "--accuracy-level",
            min=0,
            max=4,
            show_default="4",
            help="How int4 products take x: 0 any, 1 float32, 2 float16, 4 int8 (quickest).",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allow_unmatched: AllowUnmatched = None,
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Write an encoder (BERT family) as ONNX, quantized, with adapters merged.

    Example:

        lorasurgery export sentence-transformers/all-MiniLM-L6-v2 -o minilm-int4 --weights int4
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.export import ExportOptions, export
    from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions

    if writing.resume:
        raise UsageError("--resume: an export begins anew each time. Take it away.")
    how_to_pack = {
        "--zero-points": zero_points and weights != "int4",
        "--accuracy-level": accuracy_level is not None and weights != "int4",
        "--block-size": block_size and weights[:2] == "fp",
        "--include": include and weights[:2] == "fp",
        "--exclude": exclude and weights[:2] == "fp",
    }
    if given := [flag for flag, on in how_to_pack.items() if on]:
        raise UsageError(f"{given[0]}: means nothing to --weights {weights}. Take it away.")
    quantize = None
    if weights in ("nf4", "int4"):
        wanted, unwanted = tuple(include or ()), tuple(exclude or ())
        kind: Literal["nf4", "int4"] = "nf4" if weights == "nf4" else "int4"
        quantize = OnnxQuantizeOptions(
            kind,
            block_size,
            not zero_points,
            4 if accuracy_level is None else accuracy_level,
            wanted,
            unwanted,
        )
    options = ExportOptions(
        weights, tuple(adapter or ()), tuple(allow_unmatched or ()), quantize, to
    )
    source = resolve(base)
    carry_out(lambda output, how: export(source, output, options, how), writing, printing)
