"""lorasurgery unmerge: a merged model back to its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lorasurgery.cli._options import AllowUnmatched, Printing, Writing, refuse_flags
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.report import Report
    from lorasurgery.surgery import RunOptions


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
    map_file: Annotated[
        Path | None,
        typer.Option(
            "--map", metavar="FILE", help="Of an ONNX model: YAML of module: initializer or node."
        ),
    ] = None,
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
    if source.suffix == ".onnx":
        from lorasurgery.export._onnx_modules import read_map
        from lorasurgery.operations.merge_onnx import OnnxMergeOptions, merge_onnx
        from lorasurgery.operations.unmerge_onnx import unmerge_onnx

        refuse_flags(source, writing, {"--tied": tied != "auto"})
        given = read_map(map_file) if map_file else {}
        onnx = OnnxMergeOptions(given, tuple(allow_unmatched or ()), out=True)

        def taken_out(output: Path | None, how: RunOptions) -> Report:
            if undo:
                return unmerge_onnx(source, adapter, output, undo, how)
            return merge_onnx(source, adapter, output, onnx, how)

        carry_out(taken_out, writing, printing)
        return
    if map_file:
        raise UsageError(f"--map: needs an ONNX file, and {source} is none. Take it away.")
    options = UnmergeOptions(undo, tied, tuple(allow_unmatched or ()))
    carry_out(lambda output, how: unmerge(source, adapter, output, options, how), writing, printing)
