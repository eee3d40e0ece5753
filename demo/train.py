"""Train a LoRA adapter in a plain loop: forty answers of a pirate, loss on the answers alone.

y = W x + (alpha / r) B A x, in every linear layer of the model; written as PEFT writes it.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

ANSWERS = Path(__file__).with_name("answers.tsv")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 32
IGNORED = -100  # cross_entropy's own sign for a position without a loss


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to train."""

    steps: int = 32
    batch: int = 4
    rate: float = 1e-3
    seed: int = 0


class LoraLinear(nn.Module):
    """A linear layer that stays as it is, and a trained detour of rank r beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + (ALPHA / RANK) * (x @ self.a.T @ self.b.T)


def adapt(model: nn.Module) -> dict[str, LoraLinear]:
    """Freeze the model and put a LoraLinear around each of its target layers."""
    model.requires_grad_(requires_grad=False)
    found = [name for name, _ in model.named_modules() if name.endswith(TARGETS)]
    layers = {name: LoraLinear(model.get_submodule(name)) for name in found}  # type: ignore[arg-type]
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return layers


def examples(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) as tokens, through the model's chat template."""
    pairs = [line.split("\t") for line in ANSWERS.read_text(encoding="utf-8").splitlines()]
    return [
        (prompt_tokens(tokenizer, question), tokenizer.encode(f"{answer}<|im_end|>\n"))
        for question, answer in pairs
    ]


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    chat = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def batches(
    data: list[tuple[list[int], list[int]]], recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled passes over the data, padded on the right: (tokens, labels), both [batch, length]."""
    order: list[int] = []
    dice = random.Random(recipe.seed)
    for _ in range(recipe.steps):
        if len(order) < recipe.batch:
            order = dice.sample(range(len(data)), len(data))
        chosen = [data[order.pop()] for _ in range(recipe.batch)]
        length = max(len(prompt) + len(answer) for prompt, answer in chosen)
        tokens = torch.zeros(recipe.batch, length, dtype=torch.long)
        labels = torch.full((recipe.batch, length), IGNORED)
        for row, (prompt, answer) in enumerate(chosen):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield tokens, labels


def train(model: nn.Module, layers: dict[str, LoraLinear], data: Any, recipe: Recipe) -> float:
    """AdamW with a linear warm-up and decay; returns the last losses' mean."""
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, weight_decay=0.0)
    warm = max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (recipe.steps - s) / (recipe.steps - warm))
    )
    losses = []
    for step, (tokens, labels) in enumerate(batches(data, recipe)):
        hidden = model.get_submodule("model")(input_ids=tokens).last_hidden_state[:, :-1]
        chosen = labels[:, 1:] != IGNORED
        # logits of the answers alone: the vocabulary is a fifth of the model
        logits = model.get_submodule("lm_head")(hidden[chosen])
        loss = functional.cross_entropy(logits, labels[:, 1:][chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == recipe.steps - 1:
            print(f"step {step:3}  loss {losses[-1]:.3f}", flush=True)
    return sum(losses[-10:]) / len(losses[-10:])


def save(layers: dict[str, LoraLinear], base: Path, output: Path) -> None:
    """adapter_model.safetensors and adapter_config.json, by PEFT's names."""
    output.mkdir(parents=True)
    tensors = {}
    for name, layer in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.a.detach().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.b.detach().contiguous()
    save_file(tensors, output / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none",
        "target_modules": list(TARGETS), "inference_mode": True,
    }  # fmt: skip
    (output / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    started = time.perf_counter()
    recipe = Recipe()
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    layers = adapt(model)
    loss = train(model, layers, examples(tokenizer), recipe)
    save(layers, options.model, options.output)
    print(f"{len(layers)} layers, loss {loss:.3f}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
