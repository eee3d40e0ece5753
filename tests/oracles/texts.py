"""Tiny language models with a tokenizer of their own, and the inputs of their modules as torch's hooks see them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from merging import surgery
from peft import PeftModel
from tiny import Base
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# every id but one is a word's: what is not known is the last
WORDS = [f"w{i}" for i in range(71)]
IDS = [(7 * i * i + 3 * i) % 61 for i in range(90)]
TEXT = " ".join(WORDS[i] for i in IDS)


def add_tokenizer(base: Base) -> Base:
    """Word w7 is token 7."""
    words = {word: i for i, word in enumerate(WORDS)} | {"?": len(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(base.path)
    return base


def inputs(base: Base, adapter: Path, window: int) -> dict[str, np.ndarray]:
    """The inputs float64 [tokens, in] of each module that PEFT's model adapts, by its path in the base."""
    model: Any = PeftModel.from_pretrained(base.load(), adapter).eval()
    seen: dict[str, list[Tensor]] = {}
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    with _hooked(layers, seen), torch.inference_mode():
        for start in range(0, len(IDS), window):
            model(torch.tensor([IDS[start : start + window]]))
    return {n: torch.cat(of).double().numpy() for n, of in seen.items()}


@contextmanager
def _hooked(layers: dict[str, Any], seen: dict[str, list[Tensor]]) -> Iterator[None]:
    def watch(name: str, module: Any) -> Any:
        def note(_module: Any, args: Any) -> None:
            x = args[0].detach()
            if x.dtype == torch.int64:
                x = torch.nn.functional.one_hot(x, module.weight.shape[0])
            seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))

        return module.register_forward_pre_hook(note)

    handles = [watch(n.removeprefix("base_model.model."), m) for n, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def changes(base: Base, path: Path) -> dict[str, np.ndarray]:
    """What PEFT's merge does to each adapted weight, float64 [out, in] as torch multiplies by it."""
    before = dict(base.load().named_modules())
    adapted: Any = PeftModel.from_pretrained(base.load(), path)
    names = [
        n.removeprefix("base_model.model.")
        for n, m in adapted.named_modules()
        if hasattr(m, "get_delta_weight")
    ]
    merged = adapted.merge_and_unload()
    found = {}
    for name in names:
        module = merged.get_submodule(name)
        delta = (module.weight.double() - before[name].weight.double()).detach().numpy()
        turned = type(module).__name__ in ("Conv1D", "Embedding")
        found[name] = delta.T if turned else delta
    return found


def output_error(off: np.ndarray, x: np.ndarray) -> float:
    return float(((x @ off.T) ** 2).sum(1).mean() ** 0.5)


def save(base: Base, config: Any, path: Path) -> Path:
    """An adapter of PEFT's, with numbers for all that it trains."""
    model = peft.get_peft_model(base.load(), config)
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    model.save_pretrained(path)
    return path


def facts(*arguments: object) -> dict[str, Any]:
    result = surgery(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def fails(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr
