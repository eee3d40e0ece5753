"""What holds of every method: a file in training/methods/ is held to it without an edit here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorasurgery import plugins
from lorasurgery.errors import MatchError
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.surgery import RunOptions
from lorasurgery.training import method as methods
from lorasurgery.training import state
from tests.training_case import begin, llama, logits, options, run, save_base, steps

EVERY = methods.names()
# AdaLoRA's factors begin small, so that three steps at a usual rate are hardly seen
RATES = {"adalora": 0.2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("training") / "base")


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", EVERY)
def test_without_a_step_the_model_is_the_base_bit_for_bit(base, name):
    prepared = begin(base, options(name))
    adapted = prepared.trainer.parts.model
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(logits(adapted), logits(plain))


@pytest.mark.parametrize("name", EVERY)
def test_what_is_written_merges_into_what_was_trained(base, name, tmp_path):
    rate = RATES.get(name, 1e-2)
    prepared = begin(base, options(name, rate=rate))
    steps(prepared, 3)
    prepared.trainer.parts.hooks.finish()
    trained = logits(prepared.trainer.parts.model)
    run(base, tmp_path / "adapter", options(name, rate=rate))
    call = base, [str(tmp_path / "adapter")], tmp_path / "merged", MergeOptions(), RunOptions()
    if getattr(plugins.load("adapters", methods.load(name).VARIANT), "ROUTED", False):
        with pytest.raises(MatchError, match="a router chooses among its experts"):
            merge(*call)
        return
    merge(*call)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    found = logits(merged)
    # float32 sums in another order, over two layers
    torch.testing.assert_close(found, trained, atol=2e-5, rtol=1e-4)
    plain = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert not torch.allclose(plain, trained, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_frozen_keeps_its_bytes(base, name, tmp_path):
    before = files(base)
    prepared = begin(base, options(name))
    model = prepared.trainer.parts.model
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    steps(prepared, 3)
    now = dict(model.named_parameters())
    assert frozen
    assert all(torch.equal(now[n], p) for n, p in frozen.items() if "factors" not in n)
    assert [n for n, p in trained.items() if torch.equal(now[n], p)] == []
    run(base, tmp_path / "adapter", options(name))
    assert files(base) == before


@pytest.mark.parametrize("name", EVERY)
def test_trained_parameters_are_counted_once_and_are_those_of_the_groups(base, name):
    prepared = begin(base, options(name))
    model = prepared.trainer.parts.model
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    members = [m.parameter for group in prepared.groups for m in group.members]
    assert len(members) == len({id(p) for p in members})
    assert {id(p) for p in members} == set(trained)
    given = [p for g in prepared.trainer.parts.optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in given} == set(trained)


@pytest.mark.parametrize("name", EVERY)
def test_saved_loaded_and_continued_is_the_same_as_never_stopped(base, name, tmp_path):
    asked = replace(options(name, steps=6), wanted=replace(options().wanted, rank=4))
    straight = begin(base, asked)
    expected = steps(straight, 6)
    first = begin(base, asked)
    assert steps(first, 3) == expected[:3]
    state.save(first.trainer.capture(), tmp_path / "state.pt")
    del first
    torch.manual_seed(99)
    second = begin(base, asked)
    second.trainer.restore(state.load(tmp_path / "state.pt"))
    assert steps(second, 3) == expected[3:]
    one, two = (dict(p.trainer.parts.model.named_parameters()) for p in (straight, second))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", EVERY)
def test_two_runs_of_one_seed_write_the_same_bytes(base, name, tmp_path):
    for folder in ("one", "two"):
        run(base, tmp_path / folder, options(name))
    told = [files(tmp_path / folder) for folder in ("one", "two")]
    assert told[0].keys() == told[1].keys()
    for file in told[0].keys() - {"surgery.json", "metrics.jsonl"}:
        assert told[0][file] == told[1][file]


@pytest.mark.parametrize("name", EVERY)
def test_rows_of_a_batch_may_come_in_any_order(base, name):
    losses = []
    for turned in (False, True):
        prepared = begin(base, options(name, rate=1e-2))
        steps(prepared, 2)
        (batch,) = prepared.trainer.batches(3)
        if turned:
            batch = replace(batch, tokens=batch.tokens.flip(0), labels=batch.labels.flip(0))
        prepared.trainer.batches = lambda _number, batch=batch: [batch]  # type: ignore[method-assign]
        losses.append(steps(prepared, 1)[0])
        grown = logits(prepared.trainer.parts.model)
        losses.append(grown)
    assert losses[0] == pytest.approx(losses[2], rel=1e-6)
    torch.testing.assert_close(losses[1], losses[3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_micro_batches_add_up_to_the_batch(base, name):
    whole = begin(base, options(name, batch=4))
    parts = begin(base, options(name, batch=1, accumulate=4))
    assert steps(parts, 3) == pytest.approx(steps(whole, 3), rel=1e-5)


def test_a_run_leaves_an_adapter_its_report_and_its_metrics(base, tmp_path):
    total = run(base, tmp_path / "out", options())
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "surgery.json",
    ]  # fmt: skip
    assert not (tmp_path / "out.partial").exists()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert total["trained_parameters"] == sum(t.numel() for t in tensors.values())
    # r (in + out) of q, o: 32 -> 32; k, v: 32 -> 16; gate, up: 32 -> 48; down: 48 -> 32; two layers
    assert total["trained_parameters"] == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)
    assert total["base_parameters"] == sum(p.numel() for p in llama().parameters())
    told = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2, 3]
    assert total["loss"] == pytest.approx(sum(line["loss"] for line in told) / 3)
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert manifest["operation"] == "train"
    assert manifest["settings"]["method"] == "lora"
