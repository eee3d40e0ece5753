"""The export command: a model to what a runtime loads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from lorasurgery.cli._options import AllowUnmatched, Base, Exclude, Include, Printing, Writing
from lorasurgery.cli._report import carry_out
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions

To = Literal["onnx", "gguf", "vllm", "transformers"]
Weights = Literal["fp32", "fp16", "bf16", "nf4", "int4", "int8"]
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"]
Provider = Literal["cpu", "cuda", "dml", "webgpu"]


def command(
    base: Base,
    to: Annotated[To, typer.Option("--to", help="What to write, or for whom.")] = "onnx",
    weights: Annotated[
        Weights | None,
        typer.Option(
            "--weights",
            show_default="onnx fp32, else the base's",
            help="In ONNX nf4 is MatMulBnb4, int4 and int8 are MatMulNBits; no int in directories.",
        ),
    ] = None,
    type_: Annotated[
        GgufType | None,
        typer.Option("--type", show_default="f16", help="Of a GGUF's matrices."),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="An adapter; PATH:0.5 weighs it; repeatable."),
    ] = None,
    adapters_as_inputs: Annotated[
        bool | None,
        typer.Option(
            "--adapters-as-inputs/--merge-adapters",
            show_default="onnx merged, else beside",
            help="Adapters as files beside the model, to be switched at each run; or in its weights.",
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, help="Of a LoRA near to an adapter that is not read there."),
    ] = None,
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
    """Write a model for a runtime: as ONNX, as GGUF, or as a directory for vLLM or transformers.

    ONNX decoders run in onnxruntime-genai and in onnxruntime, with their KV cache; so do encoders (BERT family)
    in the latter. Adapters are merged, or stand beside the model as the runtime reads them.

    Example:

        lorasurgery export org/llama -o llama-int4 --weights int4 --adapter my-lora
        lorasurgery export org/llama -o both --weights nf4 --adapters-as-inputs -a one -a two
        lorasurgery export org/llama -o llama-gguf --to gguf --type q8_0 --adapter my-lora
        lorasurgery export org/llama -o served --to vllm --weights nf4 --adapter my-dora --rank 32
    """
    from lorasurgery.export._target import ExportOptions
    from lorasurgery.model import resolve
    from lorasurgery.operations.export import export

    if writing.resume:
        raise UsageError("--resume: an export begins anew each time. Take it away.")
    graph = {
        "--zero-points": zero_points, "--accuracy-level": accuracy_level is not None,
        "--block-size": block_size, "--head": head is not None, "--include": include,
        "--exclude": exclude, "--provider": provider != "cpu",
    }  # fmt: skip
    _refuse(
        f"--to {to}",
        (graph if to != "onnx" else {"--rank": rank})
        | ({"--weights": weights} if to == "gguf" else {"--type": type_}),
    )
    apart = to != "onnx" if adapters_as_inputs is None else adapters_as_inputs
    quantize = None
    if to == "onnx":
        weights = weights or "fp32"
        level = accuracy_level
        if level is None:
            level = 4 if provider == "cpu" else 0
        packing = _Packing(graph, block_size, zero_points, level, include, exclude, head)
        quantize = _quantize(weights, packing)
    options = ExportOptions(
        weights or "auto", tuple(adapter or ()), tuple(allow_unmatched or ()), quantize, to, provider,
        apart and (to == "onnx" or bool(adapter)), type_ or "f16", rank,
    )  # fmt: skip
    source = resolve(base)
    carry_out(lambda output, how: export(source, output, options, how), writing, printing)


@dataclass(frozen=True, slots=True)
class _Packing:
    """The flags that say how a graph's weights are packed."""

    given: Mapping[str, object]
    block_size: int | None
    zero_points: bool
    accuracy_level: int
    include: list[str] | None
    exclude: list[str] | None
    head: bool | None


def _quantize(weights: Weights, how: _Packing) -> OnnxQuantizeOptions | None:
    from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions

    integers, packed = weights in ("int4", "int8"), weights in ("nf4", "int4", "int8")
    of_integers = ("--zero-points", "--accuracy-level")
    unfit = {
        flag: on
        for flag, on in how.given.items()
        if flag != "--provider" and not (integers if flag in of_integers else packed)
    }
    _refuse(f"--weights {weights}", unfit)
    if not packed:
        return None
    return OnnxQuantizeOptions(
        cast(Literal["nf4", "int4", "int8"], weights),
        how.block_size,
        not how.zero_points,
        how.accuracy_level,
        tuple(how.include or ()),
        tuple(how.exclude or ()),
        integers if how.head is None else how.head,
    )


def _refuse(what: str, flags: Mapping[str, object]) -> None:
    if given := [flag for flag, on in flags.items() if on]:
        raise UsageError(f"{given[0]}: means nothing to {what}. Take it away.")
