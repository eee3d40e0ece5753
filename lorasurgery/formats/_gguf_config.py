"""config.json as a GGUF header's facts: the inverse of _gguf_model; what llama.cpp would get wrong is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasurgery.errors import FormatError
from lorasurgery.formats import _gguf_rope
from lorasurgery.formats._gguf_names import Family
from lorasurgery.formats._gguf_write import Value

_NUMBERS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length", "num_attention_heads": "attention.head_count",
}  # fmt: skip
_DEFAULT_LENGTH = 2048


def values(where: str, architecture: str, config: Mapping[str, Any]) -> dict[str, Value]:
    """The model's sizes under this architecture's prefix. Raises FormatError for what it cannot say."""
    found: dict[str, Value] = {}
    for theirs, ours in _NUMBERS.items():
        found[ours] = _number(where, config, theirs)
    heads = _number(where, config, "num_attention_heads")
    head_dim = config.get("head_dim") or _number(where, config, "hidden_size") // heads
    found |= {
        "context_length": int(config.get("max_position_embeddings") or _DEFAULT_LENGTH),
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "vocab_size": _number(where, config, "vocab_size"),
    }
    _check(where, config)
    found |= _gguf_rope.header(where, config)
    return {f"{architecture}.{key}": value for key, value in found.items()}


def remarks(config: Mapping[str, Any], family: Family) -> tuple[str, ...]:
    """What llama.cpp does otherwise, where no text shorter than that shows it."""
    window = config.get("sliding_window")
    used = config.get("use_sliding_window", True) if "use_sliding_window" in config else True
    if not window or not used:
        return ()
    return (
        f"a sliding window of {window} tokens is not in GGUF's {family.model_type}: llama.cpp looks at "
        "all of a longer text.",
    )


def _number(where: str, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FormatError(f"{where}: config.json says {key} is {value!r}, no number. Restore it.")
    return value


def _check(where: str, config: Mapping[str, Any]) -> None:
    act = config.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise FormatError(
            f"{where}: hidden_act is {act!r}, and llama.cpp computes 'silu'. Export --to onnx."
        )
    part = config.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        raise FormatError(
            f"{where}: partial_rotary_factor is {part:g}, and llama.cpp turns whole heads of this "
            "architecture. Export --to onnx."
        )
