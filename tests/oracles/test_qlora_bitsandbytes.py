"""A base in NF4 as bitsandbytes computes it in float32, and PEFT's QLoRA on it: the same logits, the same losses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lorasurgery.codec import CodecOptions
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.surgery import RunOptions
from lorasurgery.training.method import Wanted
from lorasurgery.training.nf4.load import load
from lorasurgery.training.options import Machine
from tests.training_case import begin, options, save_base, steps

STEPS, RATE = 10, 2e-3


@pytest.fixture(scope="module", params=[True, False], ids=["double", "single"])
def base(tmp_path_factory, request):
    """Written by `quantize` from float32 weights, in sizes that bitsandbytes takes on a CPU."""
    home = tmp_path_factory.mktemp("qlora-peer")
    save_base(home / "plain", hidden_size=64, intermediate_size=128)
    how = QuantizeOptions(CodecOptions(double=request.param))
    quantize(home / "plain", home / "nf4", how, RunOptions())
    return home / "nf4"


def theirs(base: Any) -> Any:
    """Training mode: in evaluation bitsandbytes repacks for bfloat16 on some CPUs."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    assert {m.compute_dtype for m in layers} == {torch.float32}
    return model


def test_logits_are_those_of_bitsandbytes(base):
    tokens = torch.arange(40)[None] * 6 % 256
    ours = load(base, torch.float32, CodecOptions()).train()
    model = theirs(base)
    # both multiply float32 by the same float32 weights: sums of at most 128 terms in two orders, each off by
    # 128 · 2⁻²⁴ of the terms' sizes at most, which layers of norms 2 deep pass on; terms add up to about 1
    torch.testing.assert_close(
        ours(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=2e-5, rtol=0
    )
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            x = torch.randn(3, layer.in_features, requires_grad=True)
            mine = ours.get_submodule(name)
            torch.testing.assert_close(mine(x), layer(x), atol=1e-6, rtol=1e-5)


def test_losses_are_those_of_pefts_qlora(base):
    wanted = Wanted(rank=4, alpha=12.0)
    asked = options("lora", steps=STEPS, rate=RATE, batch=3, schedule="constant")
    machine = Machine(device="cpu", nf4=CodecOptions())
    prepared = begin(base, replace(asked, wanted=wanted, machine=machine))
    config = LoraConfig(target_modules="all-linear", r=4, lora_alpha=12)
    model = get_peft_model(theirs(base), config)
    found = dict(model.named_parameters())
    for path, layer in prepared.trainer.parts.detours.layers.items():
        for name, factor in layer.factors.items():
            with torch.no_grad():
                found[f"base_model.model.{path}.lora_{name}.default.weight"].copy_(factor)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, RATE, weight_decay=0.0), []
    for step in range(1, STEPS + 1):
        (batch,) = prepared.trainer.batches(step)
        scores = model(input_ids=batch.tokens).logits
        loss = cross_entropy(scores.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert steps(prepared, STEPS) == pytest.approx(losses, abs=1e-4)
