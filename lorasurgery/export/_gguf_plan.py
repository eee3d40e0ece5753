"""A GGUF file as a plan: one edit a tensor, its rows in llama.cpp's order, encoded tile by tile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorasurgery.arrays import NUMPY, Array
from lorasurgery.checkpoint import read_json
from lorasurgery.errors import FormatError, ValueRangeError
from lorasurgery.export._target import GgufType
from lorasurgery.formats import _gguf_config, _gguf_names, _gguf_rope, _gguf_vocabulary
from lorasurgery.formats._gguf_header import NUMBERS, TYPES
from lorasurgery.formats._gguf_write import Tensor, Value, lay_out
from lorasurgery.model import Model
from lorasurgery.operations.convert_checkpoint import cast_total, ratio, square
from lorasurgery.surgery import Edit, Metrics, Plan, Step
from lorasurgery.tensors import FLOATS, TensorInfo
from lorasurgery.weights import Single

FILE = "model.gguf"

# llama.cpp's general.file_type: what most tensors are
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
_TABLES = ("token_embd.weight", "output.weight")
_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor: where it is read, what it becomes, and heads whose rows change places."""

    source: str
    target: Tensor
    heads: int | None


def plan_gguf(model: Model, kind: GgufType, name: str) -> Plan:
    """Headers alone are read. Raises FormatError for what GGUF or llama.cpp cannot hold."""
    where, architecture = str(model.path), architecture_of(model)
    family = _gguf_names.FAMILIES[architecture]
    parts = _parts(model, family, kind.upper())
    tensors = [part.target for part in parts]
    edits = [_edit(model, part) for part in parts]
    sizes = _gguf_config.values(where, architecture, model.config)
    head_dim = sizes[f"{architecture}.rope.dimension_count"]
    assert isinstance(head_dim, int)
    if divisors := _gguf_rope.divisors(model.config, head_dim):
        tensors.insert(0, Tensor(_FREQUENCIES, "F32", (len(divisors),)))
        edits.insert(0, _computed(model, tensors[0], divisors))
    values: dict[str, Value] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": name,
        **sizes,
        "general.file_type": _FILE_TYPES[kind.upper()],
        "general.quantization_version": 2,
        **_gguf_vocabulary.values(tokenizer_files(model)),
    }
    layout = lay_out(FILE, values, tensors)
    return Plan(
        "export", {"base": model.path}, {"to": "gguf", "type": kind}, tuple(edits), {},
        lambda results: {**cast_total(results), "bytes": layout.size},
        shards=(layout,),
        notes=(*_fallen(parts, kind.upper()), *_gguf_config.remarks(model.config, family)),
    )  # fmt: skip


def architecture_of(model: Model) -> str:
    """GGUF's. Raises FormatError for one that is not exported."""
    kind = model.config.get("model_type")
    found = _gguf_names.architecture_of(kind)
    if found in ("llama", "qwen2", "qwen3"):
        return found
    raise FormatError(
        f"{model.path}: model_type {kind!r} is not exported to GGUF. Known: llama, mistral, qwen2, qwen3."
    )


def tokenizer_files(model: Model) -> _gguf_vocabulary.Files:
    """Raises FormatError for a directory without tokenizer.json."""
    path = model.path / "tokenizer.json"
    if not path.is_file():
        raise FormatError(
            f"{model.path}: has no tokenizer.json, and llama.cpp takes the vocabulary out of the GGUF. "
            "Add it: transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    beside, template = model.path / "tokenizer_config.json", model.path / "chat_template.jinja"
    settings = read_json(beside) if beside.is_file() else {}
    if template.is_file():
        settings = {**settings, "chat_template": template.read_text(encoding="utf-8")}
    size = int(model.config.get("vocab_size") or 0)
    return _gguf_vocabulary.Files(str(model.path), read_json(path), settings, model.config, size)


def _parts(model: Model, family: _gguf_names.Family, kind: str) -> list[_Part]:
    """Every weight of the model, under GGUF's name. Raises FormatError for strange and missing ones."""
    tied = bool(model.config.get("tie_word_embeddings"))
    parts, strange = [], []
    for source in model.weights:
        if source.endswith("rotary_emb.inv_freq") or (tied and source == "lm_head.weight"):
            continue  # computed from the config; and the embedding once more
        name = _gguf_names.gguf(source, family)
        if name is None or model.weights.info(source).dtype not in FLOATS:
            strange.append(source)
            continue
        parts.append(_part(model, model.weights.info(source), name, (family, kind)))
    if strange:
        raise FormatError(
            f"{model.path}: {', '.join(strange[:3])} ({len(strange)} in all) have no place in GGUF's "
            f"{family.model_type}. Export --to onnx."
        )
    _check_complete(model, family, {part.target.name for part in parts}, tied)
    return parts


def _check_complete(model: Model, family: _gguf_names.Family, have: set[str], tied: bool) -> None:
    layers = int(model.config.get("num_hidden_layers") or 0)
    wanted = ["token_embd.weight", "output_norm.weight", *([] if tied else ["output.weight"])]
    wanted += [f"blk.{i}.{part}.weight" for i in range(layers) for part in family.layer]
    if missing := [name for name in wanted if name not in have]:
        names = [_gguf_names.hugging_face(name, family) for name in missing[:3]]
        raise FormatError(
            f"{model.path}: lacks {', '.join(map(str, names))} ({len(missing)} in all), which its "
            "config.json asks for. Restore the model."
        )


def _part(model: Model, info: TensorInfo, name: str, how: tuple[_gguf_names.Family, str]) -> _Part:
    family, kind = how
    role = _gguf_names.paired_role(name, family)
    heads = _gguf_names.heads_of(model.config, role) if role else None
    if heads is not None and info.shape[0] % (2 * heads):
        raise FormatError(
            f"{model.path}: {info.name}: {info.shape[0]} rows are not {heads} heads of an even size. "
            "Restore config.json."
        )
    return _Part(info.name, Tensor(name, _kind(name, info.shape, kind), info.shape), heads)


def _kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """llama.cpp's own choices: vectors in float32, the vocabulary's matrices never in 4 bits."""
    if len(shape) < 2:
        return "F32"
    if kind in ("Q4_0", "Q4_1") and name in _TABLES:
        kind = "Q8_0"
    _, block, _ = TYPES[NUMBERS[kind]]
    return "F16" if shape[-1] % block else kind


def _fallen(parts: list[_Part], kind: str) -> tuple[str, ...]:
    odd = [p for p in parts if kind.startswith("Q") and p.target.kind == "F16"]
    if not odd:
        return ()
    return (
        f"{len(odd)} matrices are F16, such as {odd[0].source}: their rows of {odd[0].target.shape[-1]} "
        "are no whole blocks of 32.",
    )


def _edit(model: Model, part: _Part) -> Edit:
    shape = part.target.shape
    head_dim = shape[0] // part.heads if part.heads else 1
    # whole heads to a tile
    multiple = head_dim * math.prod(shape[1:])

    def apply(step: Step) -> Metrics:
        error2 = norm2 = 0.0
        for _, tile in step.tiles(model.weights, part.source, multiple):
            rows = _ordered(tile, head_dim) if part.heads else tile
            data, back = _encoded(part, rows)
            step.append(part.target.name, data)
            if back is not None:
                wide = rows.astype(np.float32, copy=False)
                error2, norm2 = error2 + square(back - wide), norm2 + square(wide)
        relative = ratio(error2, norm2)
        return {"error2": error2, "norm2": norm2, "relative_error": relative} if norm2 else {}

    return Edit(part.source, (part.target.info,), apply)


def _ordered(tile: Array, head_dim: int) -> Array:
    """Rows of whole heads in llama.cpp's order."""
    found = np.empty_like(tile)
    found[_gguf_names.paired_rows(0, len(tile), head_dim)] = tile
    return found


def _encoded(part: _Part, rows: Array) -> tuple[Array, Array | None]:
    """The bytes, and what they decode to where that is not the same."""
    kind = part.target.kind
    plain = kind in NUMPY
    if plain and NUMPY[kind] == rows.dtype:
        return np.ascontiguousarray(rows), None
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if plain:
            data = rows.astype(NUMPY[kind])
            back: Array = data.astype(np.float32)
        else:
            from gguf import GGMLQuantizationType, dequantize, quantize

            number = GGMLQuantizationType[kind]
            data = quantize(np.ascontiguousarray(rows, np.float32), number)
            back = dequantize(data, number)
    if not np.isfinite(back).all():
        largest = float(np.nanmax(np.abs(rows.astype(np.float64))))
        raise ValueRangeError(
            f"{part.source}: holds {largest:.6g}, nan or inf, which do not fit into {kind}. Choose "
            "another --type."
        )
    return data, back


def _computed(model: Model, tensor: Tensor, numbers: list[float]) -> Edit:
    data = np.array(numbers, np.float32)
    source = Single(model.path, TensorInfo(tensor.name, "F32", data.shape), data)

    def apply(step: Step) -> Metrics:
        step.append(tensor.name, step.whole(source, tensor.name))
        return {}

    return Edit(tensor.name, (tensor.info,), apply)


def plain_config(config: Mapping[str, object]) -> dict[str, object]:
    """config.json of the same model, without what its weights were packed in."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
