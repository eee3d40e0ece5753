"""Adapters made in memory, of numbers that no format rounds: what a dialect is given to write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.tensors import TensorInfo

HIDDEN, WIDE, HEADS = 16, 24, 2
# a Llama's, with which a dialect that needs the base's facts is given them
BASE_CONFIG = {
    "model_type": "llama", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "num_hidden_layers": 2, "tie_word_embeddings": False,
}  # fmt: skip


def numbers(shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Sixteenths: exact in float32 and bfloat16, and so are their halves."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-32, 33, shape) / 16).astype(np.float32)


def site(module: str, config: AdapterConfig, factors: Mapping[str, Any], **fields: Any) -> Site:
    """A site whose factors are these arrays."""
    infos = {name: TensorInfo(f"{module}.{name}", "F32", f.shape) for name, f in factors.items()}
    layout = fields.pop("layout", "linear")
    return Site(module, "weight", layout, config, infos, lambda: factors, **fields)


def lora(
    module: str, out: int, in_: int, config: AdapterConfig | None = None, **fields: Any
) -> Site:
    """A plain LoRA of rank 3 and alpha 6, unless another config is given."""
    config = config or AdapterConfig("lora", 3, 6.0)
    seed = len(module)
    factors = {"A": numbers((config.rank, in_), seed), "B": numbers((out, config.rank), seed + 1)}
    if config.variant == "dora":
        factors["m"] = numbers((out, 1), seed + 2) + 4
    return site(module, config, factors, **fields)


def adapter(sites: Iterable[Site], **fields: Any) -> Adapter:
    """An adapter of these sites, named as PEFT names modules."""
    said: dict[str, Any] = {
        "path": Path("made/by-hand"), "dialect": "peft", "base": "made/base", "replaced": {},
        "added": {}, "load": None, "load_added": None, "base_config": BASE_CONFIG,
    }  # fmt: skip
    return Adapter(sites=tuple(sites), **said | fields)


def llama() -> Adapter:
    """Ranks, alphas and scalings that differ by module, as every dialect must say them."""
    at = "model.layers.{}.{}"
    found = [
        lora(at.format(0, "self_attn.q_proj"), HIDDEN, HIDDEN),
        lora(at.format(0, "self_attn.k_proj"), HIDDEN, HIDDEN, AdapterConfig("lora", 2, 4.0)),
        lora(at.format(1, "self_attn.v_proj"), HIDDEN, HIDDEN, AdapterConfig("lora", 4, 2.0)),
        lora(at.format(1, "mlp.up_proj"), WIDE, HIDDEN),
        lora(at.format(1, "mlp.down_proj"), HIDDEN, WIDE),
    ]
    return adapter(found)


def delta(site: Site) -> np.ndarray[Any, Any]:
    """s B A of plain factors, as the paper has it."""
    found = site.load()
    scale = site.config.alpha / (
        site.config.rank**0.5 if site.config.rank_stabilized else site.config.rank
    )
    change: np.ndarray[Any, Any] = scale * (found["B"] @ found["A"])
    return change
