"""What a Hugging Face directory has beside its weights, rebuilt from a GGUF header."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lorasurgery.formats import _gguf_rope, _gguf_tokenizer
from lorasurgery.formats._gguf_header import Array
from lorasurgery.formats._gguf_missing import MissingError

if TYPE_CHECKING:
    from lorasurgery.formats.gguf import File

Facts = dict[str, Any]

_DTYPES = {"F16": "float16", "BF16": "bfloat16"}


def build(file: File, dtype: str | None = None) -> tuple[dict[str, bytes], list[str]]:
    """Name -> content of what can be rebuilt, and one line for each thing that cannot."""
    made: dict[str, Facts] = {}
    notes: list[str] = []
    try:
        made, notes = _model_files(file, dtype)
    except MissingError as reason:
        notes.append(f"{file.path}: {reason}")
    try:
        made |= _gguf_tokenizer.files(file)
    except MissingError as reason:
        notes.append(f"{file.path}: {reason}")
    return {name: _text(content) for name, content in made.items()}, notes


def _text(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()


def _model_files(file: File, dtype: str | None) -> tuple[dict[str, Facts], list[str]]:
    """config.json and generation_config.json."""
    if file.family is None:
        raise MissingError(
            f"config.json is not written: architecture {file.architecture!r} is not mapped to "
            "transformers. Add it by hand."
        )
    config = _sizes(file) | _token_ids(file) | _by_family(file)
    config["torch_dtype"] = dtype or _own_dtype(file)
    rope, notes = _gguf_rope.parameters(file)
    if file.unmapped:
        notes.append(
            f"{file.path}: {', '.join(file.unmapped[:3])} ({len(file.unmapped)} in all) keep their "
            "GGUF names: transformers has no such weights."
        )
    ends = [config["eos_token_id"], file.values.get("tokenizer.ggml.eot_token_id")]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    generation: Facts = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config["pad_token_id"],
    }
    return {"config.json": config | rope, "generation_config.json": generation}, notes


def _sizes(file: File) -> Facts:
    """The shape of the model; where a weight says it too, the weight is believed."""
    assert file.family is not None
    number = _reader(file)
    embedding = "model.embed_tokens.weight"
    if embedding not in file:
        raise MissingError("config.json is not written: token_embd.weight is missing.")
    vocab_size, hidden_size = (*file.info(embedding).shape, 0, 0)[:2]
    heads = int(number("attention.head_count"))
    query = "model.layers.0.self_attn.q_proj.weight"
    return {
        "architectures": [file.family.model_class],
        "model_type": file.family.model_type,
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": int(number("feed_forward_length")),
        "num_hidden_layers": int(number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(number("attention.head_count_kv", heads)),
        "head_dim": (file.info(query).shape[0] if query in file else hidden_size) // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(number("context_length")),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "lm_head.weight" not in file,
    }


def _own_dtype(file: File) -> str:
    """That of most weights; the norms of a 16-bit file are float32."""
    kinds = Counter(file.storage(name)[0] for name in file if len(file.info(name).shape) > 1)
    return _DTYPES.get(kinds.most_common(1)[0][0], "float32") if kinds else "float32"


def _token_ids(file: File) -> Facts:
    """Written even where absent: transformers' own defaults are another model's."""
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {
        f"{ours}_token_id": file.values.get(f"tokenizer.ggml.{theirs}_token_id")
        for ours, theirs in names.items()
    }


def _by_family(file: File) -> Facts:
    assert file.family is not None
    layer = "model.layers.0"
    facts: Facts = {}
    if file.family.model_type in ("llama", "qwen3"):
        facts["attention_bias"] = f"{layer}.self_attn.q_proj.bias" in file
    if file.family.model_type == "llama":
        facts["mlp_bias"] = f"{layer}.mlp.up_proj.bias" in file
    window = file.values.get(f"{file.architecture}.attention.sliding_window")
    if file.family.model_type == "phi3" and window:
        facts["sliding_window"] = window
    return facts


def _reader(file: File) -> Callable[..., float]:
    """A function that gives one number of the architecture, or says that it is missing."""

    def number(key: str, default: float | None = None) -> float:
        value = file.values.get(f"{file.architecture}.{key}", default)
        if value is None or isinstance(value, str | Array) or not value > 0:
            raise MissingError(
                f"config.json is not written: {file.architecture}.{key} is "
                f"{'missing' if value is None else 'no number above 0'}."
            )
        return value

    return number


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for 9.999999747378752e-06."""
    short = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((s for s in short if struct.pack("f", s) == struct.pack("f", value)), value)
