"""Quantize an ONNX file, whoever exported it: MatMul to MatMulBnb4 (NF4) or MatMulNBits (int4, int8)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorasurgery.errors import MatchError
from lorasurgery.export._onnx_edit import open_for_surgery
from lorasurgery.export._onnx_linear import Linear, linears
from lorasurgery.export._onnx_quantize import replace_products
from lorasurgery.export._onnx_schemes import Scheme, scheme
from lorasurgery.export._onnx_standard import spell_out
from lorasurgery.export._onnx_write import check_file
from lorasurgery.formats.onnx import File
from lorasurgery.model import matches
from lorasurgery.operations._onnx_output import Deed, deliver
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions

# as of a model directory: embeddings and what is tied to them, and the output head
_HEAD = ("*lm_head*",)
_LEFT_OUT = ("*embed*", *_HEAD, "*wte*")


@dataclass(frozen=True, slots=True)
class OnnxQuantizeOptions:
    """`block` None: 64 for NF4, 32 for integers. Globs look at modules, initializers and nodes.

    `head`: the output head too, and an embedding that is tied to it. `standard`: operators that
    onnx.checker does not know in ONNX's own domain are spelled out.
    """

    weights: Literal["nf4", "int4", "int8"] = "nf4"
    block: int | None = None
    symmetric: bool = True
    accuracy: int = 4
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    head: bool = False
    standard: bool = False

    @property
    def scheme(self) -> Scheme:
        return scheme(self.weights, self.block, symmetric=self.symmetric, accuracy=self.accuracy)

    @property
    def settings(self) -> dict[str, object]:
        return {
            "weights": self.weights, "block_size": self.scheme.attributes(1, 1)["block_size"],
            "symmetric": self.symmetric, "accuracy_level": self.accuracy,
            "include": list(self.include), "exclude": list(self.exclude), "head": self.head,
        }  # fmt: skip


def quantize_onnx(
    base: Path, output: Path | None, options: OnnxQuantizeOptions, how: RunOptions
) -> Report:
    """Write the model with its products quantized; with no output, only compute the report.

    Raises MatchError where the graph multiplies by no matrix that may be taken.
    """
    started = time.perf_counter()
    if output:
        check_file(output, base, overwrite=how.output.overwrite)
    edited = open_for_surgery(base)
    chosen = choose(edited.file, options)
    if options.standard:
        spell_out(edited)
    packings = replace_products(edited, chosen, options.scheme, tied=options.head)

    def report(nbytes: int) -> Report:
        results = tuple(packing.finish() for packing in packings)
        size = {"bytes": float(nbytes)} if nbytes else {}
        total = {**_total(results), **size}
        return Report("quantize", results, time.perf_counter() - started, total)

    return deliver(edited, output, how, Deed(report, options.settings, {"base": base}))


def choose(file: File, options: OnnxQuantizeOptions) -> list[Linear]:
    """The weights that the patterns leave, or one error that says why there are none."""
    found = linears(file.header)
    for pattern in (*options.include, *options.exclude):
        if not any(_matches(file, linear, [pattern]) for linear in found):
            raise MatchError(
                f"{file.path}: no weight matches {pattern!r}. See `lorasurgery inspect -v`."
            )
    chosen = [
        linear for linear in found
        if _wanted(file, linear, options) and not _matches(file, linear, options.exclude)
    ]  # fmt: skip
    if not chosen:
        raise MatchError(
            f"{file.path}: none of its {len(file.header.nodes)} nodes is a MatMul or Gemm with a float "
            f"matrix of its own that may be quantized ({len(found)} are left out by name). Export the "
            "weights as initializers, or name some with --include."
        )
    return chosen


def _wanted(file: File, linear: Linear, options: OnnxQuantizeOptions) -> bool:
    if options.head and _matches(file, linear, _HEAD):
        return True
    if options.include:
        return _matches(file, linear, options.include)
    return not _matches(file, linear, _LEFT_OUT)


def _matches(file: File, linear: Linear, patterns: Sequence[str]) -> bool:
    nodes = [file.header.nodes[index].name for index in linear.nodes]
    return any(matches(name, patterns) for name in (linear.module, linear.initializer, *nodes))


def _total(results: tuple[Result, ...]) -> dict[str, float]:
    rows = [r.metrics for r in results]
    error2, norm2 = sum(m["error2"] for m in rows), sum(m["norm2"] for m in rows)
    quantized = sum(m["parameters"] for m in rows)
    bits = sum(m["bits_per_parameter"] * m["parameters"] for m in rows)
    return {
        "tensors": len(rows),
        "relative_error": math.sqrt(error2 / norm2) if norm2 else 0.0,
        "max_error": max(m["max_error"] for m in rows),
        "quantized_parameters": quantized,
        "bits_per_quantized_parameter": bits / quantized,
    }
