"""Tiny language models with a tokenizer of their own, and the inputs of their modules as torch's hooks see them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
