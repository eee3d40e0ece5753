"""A tiny base and adapters for it, made of files alone: no torch, no peft."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

OUT, IN, RANK, TOKENS = 8, 12, 3, 20
LAYER = "model.layers.0.self_attn."
Q, V = f"{LAYER}q_proj", f"{LAYER}v_proj"
PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
Arrays = dict[str, np.ndarray]


def surgery(*arguments: object) -> Result:
    from lorasurgery.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def array(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.normal(size=shape).astype(np.float32)


def factors(module: str, in_: int = IN, out: int = OUT, rank: int = RANK) -> Arrays:
    return {
        f"{PREFIX}{module}.lora_A.weight": array(rank, in_),
        f"{PREFIX}{module}.lora_B.weight": array(out, rank),
    }


def make_base(path: Path) -> Path:
    """A llama of a few tensors, one of them a bias."""
    path.mkdir()
    weights = {
        "model.embed_tokens.weight": array(TOKENS, IN), "lm_head.weight": array(TOKENS, IN),
        f"{Q}.weight": array(OUT, IN), f"{V}.weight": array(OUT, IN), f"{V}.bias": array(OUT),
    }  # fmt: skip
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": TOKENS,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def adapter(path: Path, tensors: Arrays, config: Mapping[str, Any] = {}) -> Path:
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    return path


def refused(base: Path, *adapters: object, code: int = 1, flags: tuple[object, ...] = ()) -> str:
    """The one line; nothing may be written, not even in part."""
    home = base.parent
    before = sorted(p.name for p in home.iterdir())
    result = surgery("merge", base, *adapters, "-o", home / "out", *flags)
    assert not isinstance(result.exception, Exception), result.exception
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert sorted(p.name for p in home.iterdir()) == before
    message = result.stderr.rstrip()
    assert message.startswith("error: ")
    return message.removeprefix("error: ")


def says(message: str, *words: object) -> None:
    """All of these, in this order."""
    assert re.search(".*".join(re.escape(str(word)) for word in words), message), message
