"""Small decoders with a tokenizer, as `export` wants them, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(69)]
TOKENS = np.array([1, 5, 70, 17, 17, 40, 33, 2, 9, 64])


def make_decoder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with sharp scores, so that its greedy text is not a matter of rounding."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    model = llama(**sizes | {"bos_token_id": 0, "eos_token_id": 1} | changes)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)
    model.save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "?": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?"
    ).save_pretrained(folder)
    return folder


def scores(folder: Path, tokens: np.ndarray = TOKENS) -> np.ndarray:
    """transformers' logits [length, vocabulary] in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)[None]).logits[0].numpy()
