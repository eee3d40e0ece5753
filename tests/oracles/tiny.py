"""Tiny models of each kind, adapters that PEFT itself saved for them, and PEFT's own merge.

Sizes hide nothing: in != out wherever the architecture allows, alpha != rank, factors random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from typer.testing import CliRunner, Result

VOCAB, RANK, ALPHA = 72, 3, 5.0
SCALE = ALPHA / RANK
TOKENS = torch.tensor([[1, 5, 71, 17, 17, 40, 33], [2, 2, 9, 64, 0, 12, 8]])
_ATTENTION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}  # fmt: skip


def surgery(*arguments: object) -> Result:
    """The command line in this process."""
    from lorasurgery.cli.app import app

    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments: object) -> Result:
    """The command line, which must succeed."""
    result = surgery(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_ATTENTION | {"intermediate_size": 48} | changes))


def llama_nf4_sizes(**changes: Any) -> PreTrainedModel:
    """Every row is a multiple of a block of 64, as bitsandbytes' forward on CPUs needs it."""
    return llama(hidden_size=64, intermediate_size=128, **changes)


def gpt2() -> GPT2Config:
    return GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=16)


def bert() -> BertConfig:
    return BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=16, num_labels=3,
    )  # fmt: skip


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        **_ATTENTION, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2
    )
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
    "gpt2": Kind(lambda: GPT2LMHeadModel(gpt2())),
    # names without `transformer.`, as the first checkpoints of GPT-2 on the hub have them
    "gpt2-headless": Kind(lambda: GPT2Model(gpt2())),
    "bert": Kind(lambda: BertModel(bert()), AutoModel),
    "bert-classifier": Kind(
        lambda: BertForSequenceClassification(bert()), AutoModelForSequenceClassification
    ),
    "mixtral": Kind(mixtral),
    "mixtral-fused": Kind(mixtral, saving={"save_original_format": False}),
    "qwen3-moe": Kind(qwen3_moe),
    "gpt-oss": Kind(gpt_oss),
    "llava": Kind(llava, AutoModelForImageTextToText),
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


def make_adapter(
    base: Base, path: Path, *, seed: int = 1, auto: Any = None, binary: bool = False, **config: Any
) -> Path:
    """Let PEFT make an adapter for the base, fill what it would train with numbers, and save it."""
    settings = LoraConfig(**{"r": RANK, "lora_alpha": ALPHA} | config)
    model = (auto or base.auto).from_pretrained(base.path, dtype=base.dtype)
    adapted = get_peft_model(model, settings)
    torch.manual_seed(seed)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
        elif p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    adapted.save_pretrained(path, safe_serialization=not binary)
    return path


def unmerged_by_peft(base: Base, adapter: Path) -> PeftModel:
    """The model as it is trained: base and adapter side by side."""
    return PeftModel.from_pretrained(base.load(), adapter).eval()


def merged_by_peft(base: Base, *adapters: tuple[Path, float]) -> PreTrainedModel:
    """PEFT's merge_and_unload, the adapters one after the other, each scaled."""
    model: Any = base.load()
    for i, (path, weight) in enumerate(adapters):
        if i == 0:
            model = PeftModel.from_pretrained(model, path, adapter_name="0")
        else:
            model.load_adapter(path, adapter_name=str(i))
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale(str(i), weight)
    merged: PreTrainedModel = model.merge_and_unload(
        adapter_names=[str(i) for i in range(len(adapters))]
    )
    return merged.eval()


def outputs(model: Any) -> Tensor:
    """Logits, or an encoder's last hidden state."""
    with torch.inference_mode():
        result = model(TOKENS)
    found: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return found


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, whatever its shards."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


def factors(adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module path, read from the adapter's file."""
    stored = tensors(adapter)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            a, stored[name.replace("lora_A", "lora_B")],
        )
        for name, a in stored.items() if name.endswith(".lora_A.weight")
    }  # fmt: skip


def same_weights(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The same parameters, but for the order in which float32 sums."""
    wanted = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(found[name], w, rtol=1e-6, atol=1e-6, msg=name)


def changes(adapter: Path, scale: float = SCALE) -> dict[str, Tensor]:
    """s · B A in float64 by the weight's name: exact, as far as float32 sums are concerned."""
    return {
        f"{module}.weight": scale * b.double() @ a.double()
        for module, (a, b) in factors(adapter).items()
    }


def rounded_once(found: Tensor, w: Tensor, delta: Tensor) -> None:
    """No farther from the exact sum than the nearest value, but for the error of float32 products."""
    exact = w.double() + delta
    nearest = exact.to(found.dtype).double()
    # RANK products and as many sums, each off by at most 2^-24 of the largest term
    slack = 2.0**-21 * (w.double().abs() + delta.abs() + delta.abs().max())
    too_far = (found.double() - exact).abs() > (nearest - exact).abs() + slack
    assert not too_far.any(), f"{int(too_far.sum())} of {found.numel()}"


def shrink(adapter: Path, base: Base, part: float) -> Path:
    """Scale B so that each change has this part of its weight's norm."""
    stored, weights = tensors(adapter), tensors(base.path)
    for name, delta in changes(adapter).items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"
        stored[key] = stored[key] * (part * weights[name].double().norm() / delta.norm())
    save_file(
        {name: t.float() for name, t in stored.items()},
        adapter / "adapter_model.safetensors",
        {"format": "pt"},
    )
    return adapter


def retained(
    before: dict[str, Tensor], after: dict[str, Tensor], delta: dict[str, Tensor]
) -> float:
    """<W' - W, D> / <D, D> over all weights."""
    got = sum(
        ((after[name].double() - before[name].double()) * d).sum() for name, d in delta.items()
    )
    return float(got / sum((d * d).sum() for d in delta.values()))
