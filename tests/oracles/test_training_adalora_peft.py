"""AdaLoRA beside PEFT's: the same losses, penalties, budgets and patterns, and its loader takes what is written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lorasurgery.training.method import Wanted
from lorasurgery.training.methods import adalora
from tests.training_case import begin, logits, options, run, save_base

STEPS, RATE = 16, 2e-2
SCHEDULE = {"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": STEPS}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("adalora-peft") / "base")


def asked() -> Any:
    own = adalora.Options(init_r=6, target_r=3, t_init=3, t_final=5, delta_t=2, orthogonality=0.5)
    found = options("adalora", own=own, steps=STEPS, rate=RATE, batch=3)
    return replace(found, wanted=Wanted(alpha=12.0))


def theirs(base: Any, prepared: Any) -> Any:
    """PEFT's model with the factors that ours begins with."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # without a task PEFT's wrapper goes past the layer that adds the penalty
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", lora_alpha=12, orth_reg_weight=0.5, **SCHEDULE
    )  # fmt: skip
    model = get_peft_model(model, config)
    found = dict(model.named_parameters())
    with torch.no_grad():
        for path, layer in prepared.trainer.parts.detours.layers.items():
            for name, factor in layer.factors.items():
                found[f"base_model.model.{path}.lora_{name}.default"].copy_(factor)
    return model.train()


def test_losses_budgets_and_patterns_are_pefts(base):
    prepared = begin(base, asked())
    model = theirs(base, prepared)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    allocator = model.base_model.rankallocator
    layers = prepared.trainer.parts.detours.layers
    for step in range(1, STEPS + 1):
        (batch,) = prepared.trainer.batches(step)
        # PEFT adds its penalty to a loss that the model gives: labels as the model shifts them
        labels = torch.cat([torch.full((len(batch.labels), 1), -100), batch.labels[:, :-1]], 1)
        out = model(input_ids=batch.tokens, labels=labels)
        plain = cross_entropy(out.logits.flatten(0, 1), batch.labels.flatten()).item()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - (step - 1) / STEPS)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        ours = prepared.trainer.step()
        assert ours["loss"] == pytest.approx(plain, abs=1e-4)
        assert ours["loss"] + ours["penalty"] == pytest.approx(out.loss.item(), abs=1e-4)
        assert ours["budget"] == allocator.budget_schedule(step)[0]
        pattern = model.peft_config["default"].rank_pattern
        if pattern:
            kept = prepared.trainer.parts.hooks.state()["kept"]
            ours_by_name = {f"{path}.lora_E.default": k.tolist() for path, k in kept.items()}
            assert ours_by_name == pattern
    ranks = prepared.trainer.parts.hooks.by_module()
    assert len({figures["rank"] for figures in ranks.values()}) > 1
    assert sum(figures["rank"] for figures in ranks.values()) == 3 * len(layers)
    torch.testing.assert_close(
        logits(prepared.trainer.parts.model), logits(model), atol=2e-4, rtol=1e-3
    )


def test_peft_loads_what_is_written(base, tmp_path):
    prepared = begin(base, asked())
    for _ in range(STEPS):
        prepared.trainer.step()
    run(base, tmp_path / "out", asked())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    config = loaded.peft_config["default"]
    assert {name: getattr(config, name) for name in SCHEDULE} == SCHEDULE
    trained = logits(prepared.trainer.parts.model)
    torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=1e-5)
