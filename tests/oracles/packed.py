"""NF4 directories as bitsandbytes reads and writes them."""

from __future__ import annotations

from pathlib import Path

import torch
from bitsandbytes import functional as bnb
from tiny import Base, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# a 16-bit model, its NF4 form, and an adapter for both
Quantized = tuple[Base, Base, Path]


def decoded(directory: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A stored weight as bitsandbytes dequantizes it; one that is not packed as it is."""
    stored = tensors(directory)
    parts = {key.removeprefix(f"{name}."): t for key, t in stored.items() if f"{name}." in key}
    if not parts:
        return stored[name]
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = dtype
    return bnb.dequantize_4bit(stored[name], state)


def all_decoded(directory: Path, names: list[str]) -> dict[str, Tensor]:
    return {name: decoded(directory, name, torch.float32) for name in names}


def quantize(w: Tensor) -> tuple[Tensor, bnb.QuantState]:
    """As transformers does it."""
    codes: tuple[Tensor, bnb.QuantState] = bnb.quantize_4bit(
        w.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return codes


def make_nf4(original: Base, path: Path) -> Base:
    """Let transformers quantize a model and save it, before any forward."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        original.path, dtype=original.dtype, quantization_config=settings
    )
    model.save_pretrained(path)
    return Base(path, original.auto, original.dtype)
