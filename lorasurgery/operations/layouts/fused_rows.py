"""Which rows of a fused projection are q's, k's and v's, or gate's and up's: a table by architecture.

The rows lie in groups, and in each group there are a few of every part. One group of all of q, then k, then v
is what Phi-3 has; one for each head, with a q, a k and a v, is GPT-NeoX; one for each head of k and v, with all
the q that attend to it, is Falcon. Read in transformers 5.24, and compared with it in tests/oracles/test_relayout_peers.py;
qwen's c_attn and baichuan's W_pack are of code that comes with those models, and were not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_QKV = ("q_proj", "k_proj", "v_proj")
_HALVES = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Fused:
    """A module's last name, the modules that it stands for, how their rows lie, and in which models."""

    name: str
    parts: tuple[str, ...]
    order: str  # 'blocks', 'halves', 'heads' or 'falcon'
    models: tuple[str, ...] = ()  # none: in all that no other entry names


# a model's own entries come before those of all models
TABLE = (
    Fused(
        "query_key_value", _QKV, "heads", ("gpt_neox", "gpt_neox_japanese", "bloom", "persimmon")
    ),
    Fused("query_key_value", _QKV, "falcon", ("falcon",)),
    Fused("Wqkv", _QKV, "blocks", ("mpt",)),
    Fused("c_attn", _QKV, "blocks", ("qwen",)),
    Fused("W_pack", _QKV, "blocks", ("baichuan",)),
    Fused("qkv_proj", _QKV, "blocks"),
    Fused("gate_up_proj", _HALVES, "halves"),
)
# their qkv_proj has another order, which is not in the table
_OTHER_ORDERS = ("codegen", "minimax")


@dataclass(frozen=True, slots=True)
class Rows:
    """`sizes`: how many rows of each part there are in one of the `groups`."""

    groups: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.groups * sum(self.sizes)

    def of(self, part: int) -> Array:
        """The indices of one part's rows, in its own order."""
        import numpy as np

        step, first = sum(self.sizes), sum(self.sizes[:part])
        starts = np.arange(self.groups)[:, None] * step + first
        return (starts + np.arange(self.sizes[part])).reshape(-1)

    def count(self, part: int) -> int:
        return self.groups * self.sizes[part]


def by_name(name: str, config: Mapping[str, Any]) -> Fused | None:
    """The entry for a fused module's last name, in this model; None for what is none."""
    return next((f for f in _entries(config) if f.name == name), None)


def by_part(name: str, config: Mapping[str, Any]) -> Fused | None:
    """The entry that a module of this last name is a part of."""
    return next((f for f in _entries(config) if name in f.parts), None)


def _entries(config: Mapping[str, Any]) -> list[Fused]:
    kind = text_of(config).get("model_type")
    return [
        f
        for f in TABLE
        if kind in f.models
        or (not f.models and not (f.name == "qkv_proj" and kind in _OTHER_ORDERS))
    ]


def rows(fused: Fused, config: Mapping[str, Any], total: int | None = None) -> Rows | None:
    """How the rows lie, of which there are `total`; None if the config does not tell."""
    if fused.order == "halves":
        size = total // 2 if total else text_of(config).get("intermediate_size")
        return Rows(1, (size, size)) if size else None
    text = text_of(config)
    heads, width = _first(text, "num_attention_heads", "n_head", "n_heads"), _width(text)
    if not heads or not width:
        return None
    if fused.order == "heads":
        return Rows(heads, (width,) * 3)
    if fused.order == "falcon":
        return _falcon(text, heads, width)
    kv = text.get("num_key_value_heads") or heads
    return Rows(1, (heads * width, kv * width, kv * width))


def _falcon(text: Mapping[str, Any], heads: int, width: int) -> Rows:
    """FalconAttention's three orders."""
    if text.get("new_decoder_architecture"):
        kv = text.get("num_kv_heads") or heads
        return Rows(kv, (heads // kv * width, width, width))
    if text.get("multi_query", True):
        return Rows(1, (heads * width, width, width))
    return Rows(heads, (width,) * 3)


def _width(text: Mapping[str, Any]) -> int | None:
    """Of one head."""
    if text.get("head_dim"):
        return int(text["head_dim"])
    hidden = _first(text, "hidden_size", "n_embd", "d_model")
    heads = _first(text, "num_attention_heads", "n_head", "n_heads")
    return hidden // heads if hidden and heads else None


def _first(text: Mapping[str, Any], *names: str) -> int | None:
    found = next((text[name] for name in names if text.get(name)), None)
    return int(found) if found else None


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a pipeline of several models says of its language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
