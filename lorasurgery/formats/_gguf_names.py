"""GGUF's tensor names and row orders <-> Hugging Face's, by architecture.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, "Standardized tensor names". llama.cpp
stores the rows of q and k of `llama` in pairs (2j, 2j + 1) where transformers has (j, j + half).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

# positions and rotations: no weights in transformers, which computes them from the config
_COMPUTED = re.compile(r"(rope_freqs|rope_factors_(long|short)|blk\.\d+\.attn_rot_embd)\.weight")
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Family:
    """What transformers calls an architecture, and how GGUF's layers map to it."""

    model_type: str
    model_class: str
    layer: Mapping[str, str]
    paired: bool = False  # q and k have llama.cpp's row order


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LAYER, paired=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LAYER),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _LAYER | _NORMS),
    "phi3": Family("phi3", "Phi3ForCausalLM", _LAYER | _FUSED),
}

# what others call a family: Mistral's layers are Llama's
_ALIASES = {"mistral": "llama"}


def architecture_of(model_type: object) -> str | None:
    """GGUF's name of the architecture that config.json names, or None if it is not known."""
    kind = _ALIASES.get(str(model_type), model_type)
    return next((name for name, f in FAMILIES.items() if f.model_type == kind), None)


def is_computed(name: str) -> bool:
    """A tensor that belongs to the config, such as rope_freqs: it is not presented as a weight."""
    return _COMPUTED.fullmatch(name) is not None


def hugging_face(name: str, family: Family) -> str | None:
    """The name that transformers gives this tensor, or None if the family has no such part."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    if layer is None:
        return f"{_WHOLE[part]}.{kind}" if part in _WHOLE else None
    return f"model.layers.{layer}.{family.layer[part]}.{kind}" if part in family.layer else None


def paired_role(name: str, family: Family) -> str | None:
    """'q' or 'k' if the rows of this GGUF tensor are in llama.cpp's order."""
    match = _NAME.fullmatch(name)
    if not family.paired or match is None or match[2] not in ("attn_q", "attn_k"):
        return None
    return match[2][-1]


def heads_of(config: Mapping[str, Any], role: str) -> int | None:
    """The number of heads of 'q' or 'k' by config.json, or None if it does not say it."""
    heads = config.get("num_attention_heads")
    if role == "k":
        heads = config.get("num_key_value_heads") or heads
    return heads if isinstance(heads, int) and heads > 0 else None


def paired_rows(start: int, stop: int, head_dim: int) -> Array:
    """Where rows start:stop of transformers' order lie in llama.cpp's: int64 [stop - start]."""
    import numpy as np

    row = np.arange(start, stop)
    head, inside = row - row % head_dim, row % head_dim
    half = head_dim // 2
    return head + 2 * (inside % half) + inside // half


def gguf(name: str, family: Family) -> str | None:
    """The name that GGUF gives a tensor of transformers', or None if the family has no such part."""
    module, _, kind = name.rpartition(".")
    whole = {theirs: ours for ours, theirs in _WHOLE.items()}
    if module in whole:
        return f"{whole[module]}.{kind}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    layer = {theirs: ours for ours, theirs in family.layer.items()}
    return f"blk.{match[1]}.{layer[match[2]]}.{kind}" if match and match[2] in layer else None
