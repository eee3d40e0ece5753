"""A Llama of a given size with seeded Gaussian weights in bfloat16, written tensor by tensor; or it, fine-tuned."""

from __future__ import annotations

import argparse
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from lorasurgery.arrays import Array

CHUNK = 1 << 22  # elements drawn at a time
TUNED = 64  # the rank of what fine-tuning adds to a linear layer


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers that make a Llama's architecture."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int


SHAPES = {
    "llama-1b": Shape(2048, 16, 32, 8, 8192, 128256),  # Llama-3.2-1B: 1.24 B parameters
    # two layers of it, for peers that need a whole SVD of each weight: 0.19 B parameters
    "llama-1b-part": Shape(2048, 2, 32, 8, 8192, 32000),
    "smollm2": Shape(576, 30, 9, 3, 1536, 49152),  # SmolLM2-135M
    "toy": Shape(128, 2, 4, 2, 320, 512),
}


def linears(shape: Shape) -> dict[str, tuple[int, int]]:
    """Module name -> [out, in] of each linear layer."""
    h, kv, wide = shape.hidden, shape.hidden // shape.heads * shape.kv_heads, shape.intermediate
    block = {
        "self_attn.q_proj": (h, h),
        "self_attn.k_proj": (kv, h),
        "self_attn.v_proj": (kv, h),
        "self_attn.o_proj": (h, h),
        "mlp.gate_proj": (wide, h),
        "mlp.up_proj": (wide, h),
        "mlp.down_proj": (h, wide),
    }
    return {
        f"model.layers.{layer}.{name}": size
        for layer in range(shape.layers)
        for name, size in block.items()
    }


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint; the output head is tied to the embedding."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocabulary, shape.hidden)
    }
    found.update({f"{name}.weight": size for name, size in linears(shape).items()})
    for layer in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{layer}.{norm}.weight"] = (shape.hidden,)
    found["model.norm.weight"] = (shape.hidden,)
    return found


def config(shape: Shape) -> dict[str, object]:
    """config.json as transformers writes it."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads, "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary, "tie_word_embeddings": True, "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    }  # fmt: skip


def header(found: dict[str, tuple[int, ...]]) -> bytes:
    """The head of a safetensors file of bfloat16 tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, size in found.items():
        end = offset + 2 * int(np.prod(size))
        entries[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def change(name: str, size: tuple[int, int]) -> tuple[Array, Array]:
    """A [64, in] and B [out, 64] whose singular values fall slowly; B A is 1 % of a weight."""
    rng = np.random.default_rng(zlib.crc32(f"{name} tuned".encode()))
    a = rng.standard_normal((TUNED, size[1]), dtype=np.float32)
    b = rng.standard_normal((size[0], TUNED), dtype=np.float32)
    falling = (1 + np.arange(TUNED, dtype=np.float32)) ** np.float32(-0.5)
    return a, b * falling * np.float32(1e-4)


def _add(drawn: Array, start: int, factors: tuple[Array, Array]) -> Array:
    """To some whole rows, as a base holds them in bfloat16, their part of B A."""
    a, b = factors
    columns = a.shape[1]
    rows = slice(start // columns, (start + len(drawn)) // columns)
    base = drawn.astype(ml_dtypes.bfloat16).astype(np.float32)
    moved: Array = base + (b[rows] @ a).reshape(-1)
    return moved


def make(shape: Shape, output: Path, *, tuned: bool = False) -> None:
    """Weights ~ N(0, 0.02²), norms ~ N(1, 0.1²); the same bytes whenever it is run."""
    output.mkdir(parents=True, exist_ok=True)
    found = tensors(shape)
    part = output / "model.safetensors.part"
    with part.open("wb") as file:
        file.write(header(found))
        for name, size in found.items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            mean, deviation = (1.0, 0.1) if len(size) == 1 else (0.0, 0.02)
            count = int(np.prod(size))
            linear = linears(shape).get(name.removesuffix(".weight")) if tuned else None
            factors = change(name, linear) if linear else None
            for start in range(0, count, CHUNK):
                drawn = rng.standard_normal(min(CHUNK, count - start), dtype=np.float32)
                drawn = drawn * np.float32(deviation) + np.float32(mean)
                if factors:
                    drawn = _add(drawn, start, factors)
                file.write(drawn.astype(ml_dtypes.bfloat16).tobytes())
    (output / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    part.replace(output / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tuned", action="store_true", help="the same model after fine-tuning")
    options = parser.parse_args()
    make(SHAPES[options.shape], options.output, tuned=options.tuned)


if __name__ == "__main__":
    main()
