"""Small decoders whose tokenizer a GGUF can hold: byte-level BPE, by one of the published pre-tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 320
TEXT = "It is 1824, and the 3 old sailors' boats don't float; they'll sink, slowly, in the harbour."
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def make_model(kind: str, **changes: Any) -> PreTrainedModel:
    settings = SIZES | changes
    if kind == "mistral":
        return MistralForCausalLM(MistralConfig(**settings | {"sliding_window": None}))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**settings))
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings | {"head_dim": 128}))
    return llama(**settings)


def byte_level(*first: Any) -> Tokenizer:
    """Trained on one sentence: some merges, and all bytes."""
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def make_gguf_decoder(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """Norms are not all one, biases not all zero."""
    torch.manual_seed(0)
    model = make_model(kind, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1) if p.ndim == 1 else p.mul_(4)
    model.save_pretrained(folder)
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder
