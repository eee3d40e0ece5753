"""Tiny models of each kind, as transformers saves them.

Sizes hide nothing: in != out wherever the architecture allows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 72
TOKENS = torch.tensor([[1, 5, 71, 17, 17, 40, 33], [2, 2, 9, 64, 0, 12, 8]])
_ATTENTION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}  # fmt: skip


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_ATTENTION | {"intermediate_size": 48} | changes))


def llama_nf4_sizes(**changes: Any) -> PreTrainedModel:
    """Every row is a multiple of a block of 64, as bitsandbytes' forward on CPUs needs it."""
    return llama(hidden_size=64, intermediate_size=128, **changes)


def gpt2(layers: int = 2) -> GPT2Config:
    return GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCAB, n_positions=16)


def bert(layers: int = 2) -> BertConfig:
    return BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip


def mixtral(**changes: Any) -> PreTrainedModel:
    sizes = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**_ATTENTION | sizes | changes)
    return MixtralForCausalLM(config)


def qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        **_ATTENTION, intermediate_size=48, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Experts are stored [in, out] here, and down_proj is square, so that its shape does not tell."""
    config = GptOssConfig(
        **_ATTENTION, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    )
    return GptOssForCausalLM(config)


def t5(layers: int = 2) -> PreTrainedModel:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4, vocab_size=VOCAB,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    }  # fmt: skip
    text = LlamaConfig(**_ATTENTION, intermediate_size=48)
    config = LlavaConfig(
        text_config=text.to_dict(),
        vision_config=CLIPVisionConfig(**vision).to_dict(),
        image_token_index=VOCAB - 1,
    )
    return LlavaForConditionalGeneration(config)


def qwen2_vl() -> PreTrainedModel:
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = _ATTENTION | {"intermediate_size": 48, "rope_parameters": rope}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    return Qwen2VLForConditionalGeneration(config)


@dataclass(frozen=True)
class Kind:
    """How to make a model, how transformers loads it, and how it is saved."""

    build: Callable[[], PreTrainedModel]
    auto: Any = AutoModelForCausalLM
    saving: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "llama": Kind(llama),
    "llama-biased": Kind(lambda: llama(attention_bias=True, mlp_bias=True)),
    "llama-tied": Kind(lambda: llama(tie_word_embeddings=True)),
    "llama-sharded": Kind(llama, saving={"max_shard_size": "20KB"}),
    "llama-nf4-sizes": Kind(llama_nf4_sizes),
    "llama-classifier": Kind(
        lambda: LlamaForSequenceClassification(
            LlamaConfig(**_ATTENTION, intermediate_size=48, num_labels=3)
        ),
        AutoModelForSequenceClassification,
    ),
    "gpt2": Kind(lambda: GPT2LMHeadModel(gpt2())),
    # names without `transformer.`, as the first checkpoints of GPT-2 on the hub have them
    "gpt2-headless": Kind(lambda: GPT2Model(gpt2())),
    "bert": Kind(lambda: BertModel(bert()), AutoModel),
    "bert-classifier": Kind(
        lambda: BertForSequenceClassification(bert()), AutoModelForSequenceClassification
    ),
    "t5": Kind(t5, AutoModelForSeq2SeqLM),
    "mixtral": Kind(mixtral),
    "mixtral-fused": Kind(mixtral, saving={"save_original_format": False}),
    "qwen3-moe": Kind(qwen3_moe),
    "gpt-oss": Kind(gpt_oss),
    "llava": Kind(llava, AutoModelForImageTextToText),
    "qwen2-vl": Kind(qwen2_vl, AutoModelForImageTextToText),
    # one layer each, where every variant is tried on each
    "llama, short": Kind(lambda: llama(num_hidden_layers=1)),
    "gpt2, short": Kind(lambda: GPT2LMHeadModel(gpt2(1))),
    "bert, short": Kind(lambda: BertModel(bert(1)), AutoModel),
    "t5, short": Kind(lambda: t5(1), AutoModelForSeq2SeqLM),
    "mixtral, short": Kind(lambda: mixtral(num_hidden_layers=1)),
}  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A model's directory, and what transformers loads it with."""

    path: Path
    auto: Any
    dtype: torch.dtype
    partly: bool = False  # the class has no place for some of the tensors

    def load(self, path: Path | None = None) -> PreTrainedModel:
        """The model of this or of another directory; every tensor must find its place."""
        loaded, info = self.auto.from_pretrained(
            path or self.path, dtype=self.dtype, output_loading_info=True
        )
        wrong = ["mismatched_keys", "error_msgs", *(() if self.partly else ("unexpected_keys",))]
        assert not any(info.get(kind) for kind in wrong), info
        model: PreTrainedModel = loaded.eval()
        return model


def make_base(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Save a random model of this kind."""
    torch.manual_seed(0)
    model = KINDS[kind].build().to(dtype)
    for name, p in model.named_parameters():
        # transformers starts biases at zero, where an error in them cannot be seen
        if "bias" in name or "sinks" in name:
            torch.nn.init.normal_(p, std=0.1)
    model.save_pretrained(path, **KINDS[kind].saving)
    return Base(path, KINDS[kind].auto, dtype)


def outputs(model: Any) -> Tensor:
    """Logits, or an encoder's last hidden state."""
    both = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        result = model(TOKENS, **both)
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whatever its shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found
