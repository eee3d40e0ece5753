"""The export command: a model to what a runtime loads."""

from __future__ import annotations

from typing import Annotated, Literal, cast

import typer

from lorasurgery.cli._options import AllowUnmatched, Base, Exclude, Include, Printing, Writing
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError

Weights = Literal["fp32", "fp16", "nf4", "int4", "int8"]
Provider = Literal["cpu", "cuda", "dml", "webgpu"]


def command(
    base: Base,
    to: Annotated[Literal["onnx"], typer.Option("--to", help="What to write.")] = "onnx",
    weights: Annotated[
        Weights,
        typer.Option("--weights", help="nf4 is MatMulBnb4, int4 and int8 are MatMulNBits."),
    ] = "fp32",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="An adapter; PATH:0.5 weighs it; repeatable."),
    ] = None,
    adapters_as_inputs: Annotated[
        bool,
        typer.Option(
            "--adapters-as-inputs/--merge-adapters",
            show_default="merged",
            help="Adapters as files beside the graph, to be switched at each run; or in its weights.",
        ),
    ] = False,
    provider: Annotated[
        Provider, typer.Option("--provider", help="Of onnxruntime's, what a decoder is to run on.")
    ] = "cpu",
    head: Annotated[
        bool | None,
        typer.Option(
            "--head/--no-head",
            show_default="decoders in integers: yes",
            help="Quantize the output head, and an embedding tied to it.",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option("--block-size", show_default="64, of integers 32", help="Weights to a scale."),
    ] = None,
    zero_points: Annotated[
        bool, typer.Option("--zero-points", help="Integers with a zero point for each block.")
    ] = False,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            "--accuracy-level",
            min=0,
            max=4,
            show_default="cpu 4, others 0",
            help="How integer products take x: 0 any, 1 float32, 2 float16, 4 int8 (quickest).",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    allow_unmatched: AllowUnmatched = None,
    *,
    writing: Writing,
    printing: Printing,
) -> None:
    """Write a decoder or an encoder (BERT family) as ONNX, quantized, with adapters merged.

    Decoders run in onnxruntime-genai and in onnxruntime, with their KV cache.

    Example:

        lorasurgery export org/llama -o llama-int4 --weights int4 --adapter my-lora
        lorasurgery export org/llama -o both --weights nf4 --adapters-as-inputs -a one -a two
        lorasurgery export sentence-transformers/all-MiniLM-L6-v2 -o minilm-int4 --weights int4
    """
    from lorasurgery.export._target import ExportOptions
    from lorasurgery.model import resolve
    from lorasurgery.operations.export import export
    from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions

    if writing.resume:
        raise UsageError("--resume: an export begins anew each time. Take it away.")
    integers, plain = weights in ("int4", "int8"), weights in ("fp32", "fp16")
    how_to_pack = {
        "--zero-points": zero_points and not integers,
        "--accuracy-level": accuracy_level is not None and not integers,
        "--block-size": block_size and plain,
        "--head": head is not None and plain,
        "--include": include and plain,
        "--exclude": exclude and plain,
    }
    if given := [flag for flag, on in how_to_pack.items() if on]:
        raise UsageError(f"{given[0]}: means nothing to --weights {weights}. Take it away.")
    if accuracy_level is None:
        accuracy_level = 4 if provider == "cpu" else 0
    quantize = None
    if weights == "nf4" or integers:
        quantize = OnnxQuantizeOptions(
            cast(Literal["nf4", "int4", "int8"], weights),
            block_size,
            not zero_points,
            accuracy_level,
            tuple(include or ()),
            tuple(exclude or ()),
            integers if head is None else head,
        )
    options = ExportOptions(
        weights,
        tuple(adapter or ()),
        tuple(allow_unmatched or ()),
        quantize,
        to,
        provider,
        adapters_as_inputs,
    )
    source = resolve(base)
    carry_out(lambda output, how: export(source, output, options, how), writing, printing)
