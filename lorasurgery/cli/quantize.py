"""lorasurgery quantize: 16-bit weights to NF4; those of an ONNX file to NF4, int4 or int8."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from lorasurgery.cli._options import (
    Base,
    DeviceName,
    Exclude,
    Include,
    Printing,
    Writing,
    refuse_flags,
)
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError


def command(
    base: Base,
    block_size: Annotated[
        int | None,
        typer.Option(
            "--block-size",
            show_default="64, of integers 32",
            help="Weights that share a scale: 32 to 4096.",
        ),
    ] = None,
    double_quant: Annotated[
        bool,
        typer.Option("--double-quant/--no-double-quant", help="Quantize the scales as well."),
    ] = True,
    weights: Annotated[
        Literal["nf4", "int4", "int8"],
        typer.Option("--weights", help="int4 and int8: of an ONNX file alone."),
    ] = "nf4",
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Integers with a zero point for each block.")
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            "--accuracy-level",
            min=0,
            max=4,
            show_default="4",
            help="How integer products take x: 0 any, 1 float32, 2 float16, 4 int8 (quickest).",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    device: DeviceName = "cpu",
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Quantize linear weights to NF4, as bitsandbytes would.

    Example:

        lorasurgery quantize org/model -o model-nf4
        lorasurgery quantize model.onnx -o int4.onnx --weights int4
    """
    from lorasurgery.codec import CodecOptions
    from lorasurgery.device import opened
    from lorasurgery.model import resolve
    from lorasurgery.operations.quantize import QuantizeOptions, quantize

    where = opened(device)  # before anything is downloaded
    source, wanted, unwanted = resolve(base), tuple(include or ()), tuple(exclude or ())
    integers = {"--zero-points": zero_points, "--accuracy-level": accuracy_level is not None}
    if weights == "nf4" and (given := [flag for flag, on in integers.items() if on]):
        raise UsageError(
            f"{given[0]}: belongs to integers. Pass --weights int4 or int8, or take it away."
        )
    if source.suffix == ".onnx":
        from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions, quantize_onnx

        foreign = {"--no-double-quant": not double_quant, "--device": device != "cpu"}
        refuse_flags(source, writing, foreign)
        accuracy = 4 if accuracy_level is None else accuracy_level
        onnx = OnnxQuantizeOptions(weights, block_size, not zero_points, accuracy, wanted, unwanted)
        carry_out(lambda output, how: quantize_onnx(source, output, onnx, how), writing, printing)
        return
    if weights != "nf4":
        raise UsageError(
            f"--weights {weights}: needs an ONNX file, and {source} is none. Export it first."
        )
    options = QuantizeOptions(CodecOptions(block_size or 64, double_quant), wanted, unwanted)
    carry_out(
        lambda output, how: quantize(source, output, options, how), writing, printing, device=where
    )
