"""lorasurgery quantize: 16-bit weights to NF4."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasurgery.cli._options import Base, Exclude, Include, Printing, Writing
from lorasurgery.cli._report import carry_out


def command(
    base: Base,
    block_size: Annotated[
        int, typer.Option("--block-size", help="Weights that share a scale: 32 to 4096.")
    ] = 64,
    double_quant: Annotated[
        bool,
        typer.Option("--double-quant/--no-double-quant", help="Quantize the scales as well."),
    ] = True,
    include: Include = None,
    exclude: Exclude = None,
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Quantize linear weights to NF4, as bitsandbytes would.

    Example:

        lorasurgery quantize org/model -o model-nf4
    """
    from lorasurgery.codec import CodecOptions
    from lorasurgery.model import resolve
    from lorasurgery.operations.quantize import QuantizeOptions, quantize

    options = QuantizeOptions(
        CodecOptions(block_size, double_quant), tuple(include or ()), tuple(exclude or ())
    )
    source = resolve(base)
    carry_out(lambda output, how: quantize(source, output, options, how), writing, printing)
