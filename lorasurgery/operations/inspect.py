"""Inspect: what a checkpoint or an adapter holds, from headers alone; weights are never read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.errors import FormatError
from lorasurgery.layouts import is_conv1d
from lorasurgery.model import HUB_ID
from lorasurgery.operations.inspecting.adapter_facts import adapter_facts
from lorasurgery.operations.inspecting.folding import fold, natural
from lorasurgery.operations.inspecting.onnx_facts import graph_facts
from lorasurgery.operations.inspecting.source import Source, open_source
from lorasurgery.tensors import BITS
from lorasurgery.weights import Weights

GRAPH = "model.onnx"
# integers are positions, masks and counters; what is packed into them, only its own codec knows
_COUNTED = tuple(code for code in BITS if code[0] not in "IUB" or code == "BF16")


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors that differ in the numbers of their names alone; `nbytes` of all of them, on disk."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    numel: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """`tensors` one by one, `modules` folded by layer; `dtypes` as stored, each with its sums."""

    path: str
    format: str
    files: int
    architecture: str | None
    parameters: int
    nbytes: int
    dtypes: tuple[Row, ...]
    modules: tuple[Row, ...]
    tensors: tuple[Row, ...]
    quantization: Mapping[str, Any] | None
    adapter: Mapping[str, Any] | None
    surgery: Mapping[str, Any] | None
    graph: Mapping[str, Any] | None = None


def inspect(text: str) -> Inspection:
    """A directory, a file, or a hub id, of which only headers are fetched."""
    source = _open(text)
    config = source.documents.get("config.json", {})
    weights = Weights(source.stored, turned=lambda name: is_conv1d(config, name))
    tensors = [_row(weights, name) for name in sorted(weights, key=natural)]
    return Inspection(
        path=source.label,
        format=source.format,
        files=len(source.files),
        architecture=_architecture(source),
        parameters=sum(row.numel for row in tensors if _counts(row)),
        nbytes=sum(row.nbytes for row in tensors),
        dtypes=tuple(_by_dtype(tensors)),
        modules=tuple(_folded(tensors)),
        tensors=tuple(tensors),
        quantization=_quantization(source, weights, tensors),
        adapter=adapter_facts(source),
        surgery=_surgery(source.documents.get("surgery.json")),
        graph=graph_facts(source.stored),
    )


def _open(text: str) -> Source:
    path = Path(text)
    if (path / GRAPH).is_file() and not any(path.glob("*.safetensors")):
        return open_source(path / GRAPH)  # a directory of `lorasurgery export`
    if path.exists():
        return open_source(path)
    if not HUB_ID.fullmatch(text):
        raise FormatError(f"{text}: no such file or directory. Check the path.")
    from lorasurgery.operations.inspecting.hub import open_hub

    return open_hub(text)


def _row(weights: Weights, name: str) -> Row:
    info, (dtype, nbytes) = weights.info(name), weights.storage(name)
    return Row(name, dtype, info.shape, 1, info.numel, nbytes)


def _counts(row: Row) -> bool:
    return row.dtype in _COUNTED or row.dtype not in BITS


def _by_dtype(tensors: list[Row]) -> Iterable[Row]:
    for dtype in dict.fromkeys(row.dtype for row in tensors):
        rows = [row for row in tensors if row.dtype == dtype]
        yield _sum(dtype, rows)


def _folded(tensors: list[Row]) -> Iterable[Row]:
    for folded in fold(tensors, lambda row: row.name, lambda row: (row.dtype, row.shape)):
        yield _sum(folded.name, folded.members)


def _sum(name: str, rows: Iterable[Row]) -> Row:
    rows = tuple(rows)
    numel, nbytes = sum(row.numel for row in rows), sum(row.nbytes for row in rows)
    return Row(name, rows[0].dtype, rows[0].shape, len(rows), numel, nbytes)


def _architecture(source: Source) -> str | None:
    """The class that loads it, or what GGUF calls it."""
    config = source.documents.get("config.json", {})
    named = config.get("architectures") or [config.get("model_type")]
    return named[0] or source.stored.metadata.get("general.architecture")


def _quantization(source: Source, weights: Weights, tensors: list[Row]) -> dict[str, Any] | None:
    if weights.packed:
        states = [packed.state for packed in weights.packed.values()]
        rows = [row for row in tensors if row.name in weights.packed]
        return {
            "method": "/".join(sorted({str(state["quant_type"]) for state in states})),
            "block_sizes": sorted({int(state["blocksize"]) for state in states}),
            "double": sorted({"nested_blocksize" in state for state in states}),
            **_bits(rows, tensors),
        }
    rows = [row for row in tensors if row.dtype not in BITS]
    if rows:
        return {"method": source.format, **_bits(rows, tensors)}
    declared = source.documents.get("config.json", {}).get("quantization_config")
    if isinstance(declared, dict):
        return {"method": str(declared.get("quant_method", "unknown")), "config": declared}
    return None


def _bits(rows: list[Row], tensors: list[Row]) -> dict[str, Any]:
    """Bits per parameter of the quantized weights, and of all."""
    numel, everything = sum(row.numel for row in rows), sum(row.numel for row in tensors)
    return {
        "weights": len(rows),
        "bits_per_quantized_parameter": 8 * sum(row.nbytes for row in rows) / max(1, numel),
        "bits_per_parameter": 8 * sum(row.nbytes for row in tensors) / max(1, everything),
    }


def _surgery(manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Which operation of ours made it, from what."""
    if manifest is None:
        return None
    keys = ("lorasurgery", "operation", "inputs", "settings", "total", "notes")
    return {key: manifest[key] for key in keys if key in manifest}
