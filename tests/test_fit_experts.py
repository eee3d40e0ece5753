"""Adapters of experts for a runtime: one by one or stacked, as its own model reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from algebra import facts
from handmade import adapter, delta, lora
from safetensors.numpy import load_file
from test_experts import AT, EXPERTS, HIDDEN, WIDE, base, stack

from lorasurgery.adapter import Adapter, AdapterConfig
from lorasurgery.dialects import peft
from lorasurgery.errors import MatchError
from lorasurgery.model import Model, open_model
from lorasurgery.operations.lint import lint
from lorasurgery.operations.runtimes.fit import fit

NAMES = [f"{AT}.{e}.{p}" for e in range(EXPERTS) for p in ("gate_proj", "up_proj", "down_proj")]
STACKS = "Qwen3VLMoeForConditionalGeneration"


@pytest.fixture
def one_by_one(tmp_path: Path) -> Model:
    return open_model(base(tmp_path / "base", architectures=["Qwen3MoeForCausalLM"]))


@pytest.fixture
def in_stacks(tmp_path: Path) -> Model:
    return open_model(base(tmp_path / "stacks", fused=True, architectures=[STACKS]))


def test_stacks_are_written_expert_by_expert_for_vllm(one_by_one, tmp_path):
    made = adapter([stack(), stack("down_proj", AdapterConfig("lora", 3, 4.0))])
    source, out = tmp_path / "it", tmp_path / "out"
    source.mkdir()
    peft.write(made, source)
    report = facts("convert", source, "-o", out, "--for", "vllm", "--base", one_by_one.path)
    assert report["total"]["modules"] == 3 * EXPERTS
    config = json.loads((out / "adapter_config.json").read_text())
    # it reads these two numbers alone
    assert (config["r"], config["lora_alpha"]) == (8, 8)
    held = load_file(out / "adapter_model.safetensors")
    assert {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in held} == {
        *NAMES
    }
    for e in range(EXPERTS):
        parts = [
            held[f"base_model.model.{AT}.{e}.{p}.lora_B.weight"]
            @ held[f"base_model.model.{AT}.{e}.{p}.lora_A.weight"]
            for p in ("gate_proj", "up_proj", "down_proj")
        ]
        # the scale is rounded into B
        near = {"rtol": 1e-6, "atol": 4e-6}
        np.testing.assert_allclose(np.concatenate(parts[:2]), delta(made.sites[0])[e], **near)
        np.testing.assert_allclose(parts[2], delta(made.sites[1])[e], **near)
    assert lint(out, "vllm", one_by_one.path).rows[0].feature == "experts one by one"
    assert {row.verdict for row in lint(out, "vllm", one_by_one.path).rows} == {"ok"}


def test_experts_without_factors_get_zeros_for_vllm(one_by_one):
    made = adapter([lora(f"{AT}.1.up_proj", WIDE, HIDDEN), lora("model.norm_proj", 4, 6)])
    with pytest.raises(MatchError):  # the base has no norm_proj
        fit(made, "vllm", one_by_one)
    made = replace(made, sites=made.sites[:1])
    found = fit(made, "vllm", one_by_one)
    assert sorted(s.module for s in found.adapter.sites) == sorted(NAMES)
    for site in found.adapter.sites:
        wanted = (HIDDEN, WIDE) if site.module.endswith("down_proj") else (WIDE, HIDDEN)
        assert site.size == wanted
        assert bool(delta(site).any()) == (site.module == f"{AT}.1.up_proj")
    assert "8 experts' modules that were not adapted get factors of zeros" in found.notes


def test_a_model_that_takes_stacks_gets_both_of_them(in_stacks, tmp_path):
    found = fit(adapter([stack()]), "vllm", in_stacks)
    up, down = found.adapter.sites
    assert [(s.module, s.parameter) for s in (up, down)] == [
        (AT, "gate_up_proj"),
        (AT, "down_proj"),
    ]
    assert down.size == (HIDDEN, WIDE)
    assert not delta(down).any()
    peft.write(found.adapter, tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    # as vllm/lora/model_manager.py takes them apart: what leads in is below base_layer
    a = held[f"base_model.model.{AT}.base_layer.lora_A.weight"].reshape(EXPERTS, -1, HIDDEN)
    b = held[f"base_model.model.{AT}.base_layer.lora_B.weight"].reshape(2 * WIDE, -1, EXPERTS)
    np.testing.assert_allclose(b.transpose(2, 0, 1) @ a, delta(stack()), rtol=1e-6, atol=4e-6)


def test_experts_one_by_one_are_stacked_for_a_model_that_takes_stacks(in_stacks):
    made = adapter([lora(f"{AT}.2.down_proj", HIDDEN, WIDE)])
    found = {s.parameter: s for s in fit(made, "vllm", in_stacks).adapter.sites}
    assert found.keys() == {"gate_up_proj", "down_proj"}
    whole = np.zeros((EXPERTS, HIDDEN, WIDE))
    whole[2] = delta(made.sites[0])
    np.testing.assert_allclose(delta(found["down_proj"]), whole, rtol=1e-6, atol=4e-6)


def refused(made: Adapter, runtime: str, model: Model | None = None) -> str:
    with pytest.raises(MatchError) as error:
        fit(made, runtime, model)
    return str(error.value).removeprefix("made/by-hand: ")


def test_experts_are_refused_where_nobody_knows_how_they_are_read():
    assert refused(adapter([stack()]), "vllm") == (
        "experts are adapted, and vllm reads them one by one or stacked, as the model is. Give the base."
    )
    assert refused(adapter([stack()]), "sglang") == (
        f"sglang cannot hold stacked experts ({AT}): nobody has looked whether it reads them. Merge it, or leave "
        "it out."
    )


def test_lint_knows_which_models_take_stacks(one_by_one, in_stacks, tmp_path):
    peft.write(adapter([stack()]), tmp_path)
    (row,) = lint(tmp_path, "vllm", one_by_one.path).rows
    assert (row.feature, row.verdict) == ("stacked experts", "rejected")
    (row,) = lint(tmp_path, "vllm", in_stacks.path).rows
    assert (row.feature, row.verdict) == ("stacked experts", "ok")
    (tmp_path / "one").mkdir()
    peft.write(adapter([lora(f"{AT}.1.up_proj", WIDE, HIDDEN)]), tmp_path / "one")
    rows = {r.feature: r.verdict for r in lint(tmp_path / "one", "vllm", one_by_one.path).rows}
    assert rows == {"experts one by one": "ok", "experts without factors": "rejected"}
    rows = {r.feature: r.verdict for r in lint(tmp_path / "one", "vllm", in_stacks.path).rows}
    assert rows["experts one by one"] == "rejected"
