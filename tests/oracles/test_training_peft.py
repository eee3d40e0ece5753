"""PEFT's layers and optimizers, given the same factors, batches and rates: the same losses, step for step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from lorasurgery.training.attach import Targets
from lorasurgery.training.method import Rates, Wanted
from lorasurgery.training.methods import lora_fa, lora_plus
from tests.training_case import begin, logits, options, run, save_base

RANK, STEPS, RATE = 4, 20, 2e-3
# PEFT's names of a factor, and whether it is stored flat
NAMES = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "b": "vera_lambda_b.default",
         "d": "vera_lambda_d.default", "m": "lora_magnitude_vector.default.weight"}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("training-peft") / "base")


def theirs(base: Any, prepared: Any, **fields: Any) -> Any:
    """PEFT's model with the factors that ours begins with."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    kind = VeraConfig if "projection_prng_key" in fields else LoraConfig
    model = get_peft_model(model, kind(target_modules="all-linear", r=RANK, **fields))
    found = dict(model.named_parameters())
    for path, layer in prepared.trainer.parts.detours.layers.items():
        for name, factor in layer.factors.items():
            if kind is VeraConfig and name in "AB":
                continue  # both draw them from the same seed
            with torch.no_grad():
                target = found[f"base_model.model.{path}.{NAMES[name]}"]
                target.copy_(factor.reshape(target.shape))
    return model.train()


def curve(model: Any, prepared: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """A plain loop on our batches: linear decay, clipping at 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(1, STEPS + 1):
        (batch,) = prepared.trainer.batches(step)
        scores = model(input_ids=batch.tokens).logits
        loss = cross_entropy(scores.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - (step - 1) / STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def asked(method: str, rate: float = RATE, own: Any = None, **wanted: Any) -> Any:
    found = options(method, own=own, steps=STEPS, rate=rate, batch=3)
    return replace(found, wanted=Wanted(rank=RANK, **wanted))


CASES = {
    "lora": ("lora", {"alpha": 12.0}, {"lora_alpha": 12}),
    "rslora": ("rslora", {"alpha": 12.0}, {"lora_alpha": 12, "use_rslora": True}),
    "dora": ("dora", {"alpha": 12.0}, {"lora_alpha": 12, "use_dora": True}),
    "vera": ("vera", {}, {"projection_prng_key": 0, "d_initial": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_pefts_layers(base, case):
    method, wanted, fields = CASES[case]
    rate = 2e-2 if method == "vera" else RATE
    prepared = begin(base, asked(method, rate, **wanted))
    model = theirs(base, prepared, **fields)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0
    )
    expected = curve(model, prepared, optimizer)
    found = [prepared.trainer.step()["loss"] for _ in range(STEPS)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] < found[0] - 0.01
    ours, peft = logits(prepared.trainer.parts.model), logits(model)
    torch.testing.assert_close(ours, peft, atol=2e-4, rtol=1e-3)


def test_dora_with_dropout_puts_it_where_peft_does(base):
    prepared = begin(base, asked("dora", dropout=0.3, alpha=12.0))
    model = theirs(base, prepared, lora_alpha=12, use_dora=True, lora_dropout=0.3)
    with torch.no_grad():
        for path, layer in prepared.trainer.parts.detours.layers.items():
            other = model.get_submodule(f"base_model.model.{path}")
            for name in ("A", "B", "m"):
                factor = layer.factors[name]
                factor += 0.1 * torch.randn(factor.shape)
                mine = dict(other.named_parameters())[NAMES[name]]
                mine.copy_(factor.reshape(mine.shape))
    (batch,) = prepared.trainer.batches(1)
    torch.manual_seed(5)
    ours = prepared.trainer.parts.model(input_ids=batch.tokens).logits
    torch.manual_seed(5)
    peft = model(input_ids=batch.tokens).logits
    torch.testing.assert_close(ours, peft, atol=1e-4, rtol=1e-4)


def test_an_embedding_and_a_biased_layer_are_adapted_as_peft_adapts_them(base):
    names = ("embed_tokens", "q_proj", "lm_head")
    prepared = begin(base, replace(asked("lora", alpha=12.0), targets=Targets(names)))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(target_modules=list(names), r=RANK, lora_alpha=12))
    found = dict(model.named_parameters())
    assert len([n for n in found if "lora_" in n]) == 2 * len(prepared.trainer.parts.detours.layers)
    with torch.no_grad():
        for path, layer in prepared.trainer.parts.detours.layers.items():
            under = f"base_model.model.{path}"
            for name, factor in layer.factors.items():
                factor.add_(0.1 * torch.randn(factor.shape))
                if layer.layout == "embedding":
                    other = "B" if name == "A" else "A"
                    found[f"{under}.lora_embedding_{other}.default"].copy_(factor.T)
                else:
                    found[f"{under}.{NAMES[name]}"].copy_(factor)
    torch.testing.assert_close(
        logits(prepared.trainer.parts.model), logits(model), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("method", ["lora", "lora+", "lora-fa", "rslora", "dora", "vera"])
def test_peft_loads_what_is_written_and_computes_what_was_trained(base, tmp_path, method):
    rate = 2e-2 if method == "vera" else RATE
    prepared = begin(base, replace(asked(method, rate), pace=replace(options().pace, rate=rate)))
    for _ in range(3):
        prepared.trainer.step()
    run(
        base,
        tmp_path / "out",
        replace(asked(method, rate), pace=replace(options().pace, rate=rate)),
    )
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    loaded = logits(PeftModel.from_pretrained(plain, str(tmp_path / "out")))
    torch.testing.assert_close(loaded, logits(prepared.trainer.parts.model), atol=1e-5, rtol=1e-4)
    assert (loaded - before).abs().max() > 1e-3


def by_rate(groups: Any, named: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Each parameter's rate and weight decay, by PEFT's name of it."""
    return {
        named[id(p)]: (group["lr"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("dora", [False, True])
def test_compat_gives_each_parameter_the_rate_of_pefts_loraplus_optimizer(base, dora):
    own = lora_plus.Options(ratio=8.0, embedding_rate=3e-6, compat="peft")
    prepared = begin(base, asked("dora" if dora else "lora"))
    named = prepared.trainer.parts.detours.named()
    groups = lora_plus.groups(named, Rates(RATE), own)
    ours = {m.name: (g.rate, g.decay) for g in groups for m in g.members}
    model = theirs(base, prepared, use_dora=dora)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8.0, loraplus_lr_embedding=3e-6
    )
    peft = by_rate(optimizer.param_groups, {id(p): n for n, p in model.named_parameters()})
    assert len(ours) == len(peft)
    for name, rates in ours.items():
        path, _, factor = name.rpartition(".")
        assert peft[f"base_model.model.{path}.{NAMES[factor]}"] == pytest.approx(rates), name


def test_lora_plus_has_the_losses_of_pefts_optimizer(base):
    prepared = begin(base, asked("lora+", 2e-4, alpha=12.0, own=lora_plus.Options(ratio=16.0)))
    model = theirs(base, prepared, lora_alpha=12)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16.0, eps=1e-8
    )
    expected = curve(model, prepared, optimizer)
    assert [prepared.trainer.step()["loss"] for _ in range(STEPS)] == pytest.approx(
        expected, abs=1e-4
    )


def test_lora_fa_has_the_groups_and_losses_of_pefts_optimizer(base):
    own = lora_fa.Options(fa_projection=True)
    prepared = begin(base, asked("lora-fa", alpha=12.0, own=own))
    model = theirs(base, prepared, lora_alpha=12)
    optimizer = create_lorafa_optimizer(model, r=RANK, lora_alpha=12, lr=RATE)
    named = {id(p): n for n, p in model.named_parameters() if p.requires_grad}
    trained = [
        {**group, "params": [p for p in group["params"] if p.requires_grad]}
        for group in optimizer.param_groups
    ]
    ours = {m.name: (g.rate, g.decay) for g in prepared.groups for m in g.members}
    assert by_rate(trained, named) == {
        f"base_model.model.{name.removesuffix('.B')}.{NAMES['B']}": rates
        for name, rates in ours.items()
    }
    for group in optimizer.param_groups:
        group["eps"] = 1e-8
    expected = curve(model, prepared, optimizer)
    assert [prepared.trainer.step()["loss"] for _ in range(STEPS)] == pytest.approx(
        expected, abs=1e-4
    )
    a = {n: p.requires_grad for n, p in model.named_parameters() if "lora_A" in n}
    assert not any(a.values())
