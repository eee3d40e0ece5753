"""A small made-up model and adapters for it, written by hand: files in, files out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, LAYERS, VOCAB = 64, 160, 2, 48
RANK, ALPHA = 3, 7.0


def tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """A Llama's names, with biases; N(0, 0.02²)."""
    rng = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        at = f"model.layers.{i}"
        shapes[f"{at}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{at}.self_attn.q_proj.bias"] = (HIDDEN,)
        shapes[f"{at}.mlp.up_proj.weight"] = (WIDE, HIDDEN)
        shapes[f"{at}.mlp.down_proj.weight"] = (HIDDEN, WIDE)
        shapes[f"{at}.input_layernorm.weight"] = (HIDDEN,)
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {n: (0.02 * torch.randn(s, generator=rng)).to(dtype) for n, s in shapes.items()}


def config(**changes: Any) -> dict[str, Any]:
    """config.json of it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "vocab_size": VOCAB, "tie_word_embeddings": False,
        "attention_bias": True, **changes,
    }  # fmt: skip


def base(folder: Path, dtype: torch.dtype = torch.bfloat16, *, shards: int = 1) -> Path:
    """The model as a directory; `shards` files in an order and a spacing that nobody else would choose."""
    folder.mkdir(parents=True)
    held = tensors(dtype)
    (folder / "config.json").write_text(json.dumps(config(), indent=3, sort_keys=True))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt", "made": "by hand"})
        return folder
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(held)}
    for file in files:
        save_file({n: t for n, t in held.items() if where[n] == file}, folder / file)
    index = {"weight_map": where, "metadata": {"total_size": 12345}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def adapter(
    folder: Path,
    targets: tuple[str, ...] = ("q_proj", "up_proj", "down_proj"),
    *,
    seed: int = 1,
    size: float = 1.0,
    whole: tuple[str, ...] = (),
    **fields: Any,
) -> Path:
    """A LoRA in PEFT's layout, of about `size` percent of the weights it changes."""
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(seed)
    held, settings = {}, {"r": RANK, "lora_alpha": ALPHA, **fields}
    for name, w in tensors().items():
        module = name.removesuffix(".weight")
        if name.endswith(whole) and whole:
            held[f"base_model.model.{name}"] = 0.02 * torch.randn(w.shape, generator=rng)
        elif name.endswith(".weight") and module.endswith(targets):
            a = torch.randn(RANK, w.shape[1], generator=rng)
            b = torch.randn(w.shape[0], RANK, generator=rng)
            scale = 0.01 * size * w.float().norm() / (b @ a * ALPHA / RANK).norm()
            held[f"base_model.model.{module}.lora_A.weight"] = a
            held[f"base_model.model.{module}.lora_B.weight"] = b * scale
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "target_modules": list(targets), "bias": "none",
        "base_model_name_or_path": "made/by-hand", **settings,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
