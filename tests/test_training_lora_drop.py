"""LoRA-drop: what select finds and keeps, what the others share, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from lorasurgery.errors import FormatError, LoraSurgeryError, MatchError, UsageError
from lorasurgery.operations.algebra.adapter_output import AdapterFormat
from lorasurgery.operations.convert import ConvertOptions, convert
from lorasurgery.surgery import RunOptions
from lorasurgery.training.attach import Targets
from lorasurgery.training.batches import collate
from lorasurgery.training.examples import Example
from lorasurgery.training.kept import Kept
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods import lora_drop
from lorasurgery.training.select import Selecting, _moments, _sampled, sampled, select
from tests.training_case import TEXT, begin, kept, logits, options, run, save_base, steps

# otherwise it stays in our own layout
AS_LORA = ConvertOptions("lora", form=AdapterFormat("peft"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("drop") / "base")


@pytest.fixture(scope="module")
def found(base):
    how = Selecting(threshold=0.9, sample=0.05)
    return select(base, options("lora", steps=3, rate=1e-2), how).kept


def test_importance_sums_to_1_over_all_and_its_share_over_each_group(found):
    assert sum(one.importance for one in found.modules) == pytest.approx(1)
    groups = {one.group for one in found.modules}
    assert len(groups) == 7
    for group in groups:
        assert sum(one.share for one in found.modules if one.group == group) == pytest.approx(1)


def test_what_is_kept_is_the_shortest_beginning_that_has_the_threshold(found):
    for group in {one.group for one in found.modules}:
        members = sorted((o for o in found.modules if o.group == group), key=lambda o: -o.share)
        keep = [one.kept for one in members]
        assert keep == sorted(keep, reverse=True)
        together = sum(one.share for one in members if one.kept)
        assert together >= 0.9 * (1 - 1e-9)
        assert together - min(one.share for one in members if one.kept) < 0.9


def test_importance_is_that_of_the_outputs_themselves(base):
    asked, how = options("lora", steps=3, rate=1e-2), Selecting(sample=0.05)
    trainer, sample = _sampled(base, asked, how)
    while not trainer.over:
        trainer.step()
    layers = trainer.parts.detours.layers
    seen: dict[str, list[np.ndarray]] = {path: [] for path in layers}
    handles = [layer.register_forward_pre_hook(
        lambda _layer, given, path=path: seen[path].append(given[0].flatten(0, 1).detach().double().numpy())
    ) for path, layer in layers.items()]  # fmt: skip
    moments, tokens = _moments(trainer, sample)
    for handle in handles:
        handle.remove()
    assert tokens == sum(len(example.tokens) for example in sample)
    kept_modules = {one.module: one for one in select(base, asked, how).kept.modules}
    for path, layer in layers.items():
        x = np.concatenate(seen[path])
        a, b = (layer.factors[n].detach().double().numpy() for n in "AB")
        expected = np.mean(np.sum((2.0 * x @ a.T @ b.T) ** 2, axis=1))
        assert kept_modules[path].output2 == pytest.approx(expected, rel=1e-5)
        assert moments[path].square == pytest.approx(np.mean(np.sum(x**2, axis=1)), rel=1e-5)


def test_a_lower_threshold_keeps_a_part_of_the_same(base, found):
    less = select(base, options("lora", steps=3, rate=1e-2), Selecting(0.5, sample=0.05)).kept
    assert less.keep <= found.keep
    assert less.keep != found.keep
    over_all = select(base, options("lora", steps=3, rate=1e-2), Selecting(1.0, "all", 0.05)).kept
    assert over_all.keep == over_all.weighed
    assert sum(one.share for one in over_all.modules) == pytest.approx(1)


def test_a_module_whose_input_is_nothing_is_never_kept(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    nn.init.zeros_(model.model.layers[1].input_layernorm.weight)
    for module in model.model.layers[1].self_attn.children():
        nn.init.zeros_(module.bias)
    model.save_pretrained(tmp_path / "dead")
    for file in base.glob("token*"):
        (tmp_path / "dead" / file.name).write_bytes(file.read_bytes())
    how = Selecting(1.0, sample=0.05)
    got = select(tmp_path / "dead", options("lora", steps=3, rate=1e-2), how).kept
    # q, k, v see zeros, so that o does too
    assert {one.module for one in got.modules if not one.kept} == {
        f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"
    }


def test_before_b_has_left_zero_nothing_is_selected(base):
    with pytest.raises(UsageError) as error:
        select(base, options("lora", steps=0), Selecting(sample=0.05))
    assert str(error.value) == (
        "--steps 0: B has not left 0 then, and nothing is more important than another. Train for some steps."
    )
    with pytest.raises(UsageError) as error:
        select(base, options("lora", steps=1, rate=0.0), Selecting(sample=0.05))
    assert str(error.value) == (
        "--steps 1: none of the 14 changes does anything to an output yet. Train longer, or at a higher --lr."
    )
    with pytest.raises(UsageError) as error:
        select(base, options("lora"), Selecting(threshold=1.5))
    assert str(error.value) == "--threshold 1.5: is a share. Pass more than 0, and 1 at most."


def test_a_sample_has_every_label():
    examples = [Example(str(i), (1, 2), (), label=0 if i < 95 else 1) for i in range(100)]
    labels = [example.label for example in sampled(examples, 0.1, 3)]
    assert (labels.count(0), labels.count(1)) == (round(0.1 * 95), 1)
    assert sampled(examples, 0.1, 3) == sampled(examples, 0.1, 3)
    assert sampled(examples, 1.0, 3) == examples


def test_a_shared_pair_is_one_parameter_with_the_gradients_of_all(base):
    prepared = begin(base, options("lora-drop", rate=1e-2))
    steps(prepared, 1)  # B has left 0
    layers = prepared.trainer.parts.detours.layers
    gates = [layers[f"model.layers.{i}.mlp.gate_proj"] for i in range(2)]
    assert gates[0].factors["A"] is gates[1].factors["A"]
    assert layers["model.layers.0.self_attn.q_proj"].factors["A"].data_ptr() != (
        layers["model.layers.1.self_attn.q_proj"].factors["A"].data_ptr()
    )
    (batch,) = prepared.trainer.batches(2)

    def gradient() -> torch.Tensor:
        model = prepared.trainer.parts.model
        model.zero_grad()
        model(input_ids=batch.tokens).logits.square().mean().backward()
        return gates[0].factors["B"].grad.clone()

    together = gradient()
    apart = []
    shared = gates[0].factors["B"]
    for one, other in (gates, gates[::-1]):
        other.factors["B"] = nn.Parameter(shared.detach().clone(), requires_grad=False)
        one.factors["B"] = shared
        prepared.trainer.parts.model.zero_grad()
        prepared.trainer.parts.model(input_ids=batch.tokens).logits.square().mean().backward()
        apart.append(shared.grad.clone())
        other.factors["B"] = shared
    torch.testing.assert_close(together, apart[0] + apart[1], atol=1e-8, rtol=1e-4)


def test_parameters_are_those_of_the_kept_and_of_a_pair_for_each_group(base, tmp_path):
    total = run(base, tmp_path / "out", options("lora-drop"))
    # kept: q twice, v of layer 0, down of layer 1; groups: k, v, o, gate, up, down
    q, k, gate = 32 + 32, 32 + 16, 32 + 48
    assert total["trained_parameters"] == 4 * (2 * q + k + gate) + 4 * (k + k + q + 3 * gate)


def test_it_converts_to_a_lora_that_peft_runs_alike(base, tmp_path):
    prepared = begin(base, options("lora-drop", rate=1e-2, steps=4))
    steps(prepared, 4)
    trained = logits(prepared.trainer.parts.model)
    run(base, tmp_path / "out", options("lora-drop", rate=1e-2, steps=4))
    content = json.loads((tmp_path / "out" / "adapter.json").read_text())
    keys = {site["module"]: site["factors"]["A"] for site in content["sites"]}
    assert keys["model.layers.0.mlp.up_proj"] == keys["model.layers.1.mlp.up_proj"]
    assert len(set(keys.values())) == 4 + 6
    convert(tmp_path / "out", tmp_path / "lora", AS_LORA, RunOptions())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(model, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), trained, atol=1e-5, rtol=1e-5)


def test_without_sharing_the_others_are_left_alone_and_it_is_a_lora(base, tmp_path):
    own = lora_drop.Options(kept(), "none")
    total = run(base, tmp_path / "out", options("lora-drop", own=own))
    assert total["trained_parameters"] == 4 * (2 * (32 + 32) + (32 + 16) + (32 + 48))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(Kept.read(Path(kept())).keep)


def test_with_all_kept_it_is_lora(base, tmp_path):
    everything = Kept(tuple(replace(one, kept=True) for one in Kept.read(Path(kept())).modules), {})
    everything.write(tmp_path / "all.json")
    own = lora_drop.Options(str(tmp_path / "all.json"))
    one = steps(begin(base, options("lora-drop", own=own)), 3)
    assert one == steps(begin(base, options("lora")), 3)


def test_what_was_not_selected_on_these_modules_is_refused(base, tmp_path):
    with pytest.raises(UsageError) as error:
        lora_drop.configure(Wanted(), lora_drop.Options())
    assert str(error.value) == (
        "--keep: lora-drop must know which modules matter. Run `lorasurgery select BASE --data ... -o FILE`, and "
        "pass that file."
    )
    asked = replace(options("lora-drop"), targets=Targets(("q_proj", "v_proj")))
    with pytest.raises(MatchError) as wrong:
        begin(base, asked)
    assert str(wrong.value) == (
        f"--keep {kept()}: model.layers.0.mlp.down_proj is not adapted but was weighed, and 9 more are so. "
        "Select with the same base and --target-modules."
    )
    (tmp_path / "other.json").write_text('{"format": "other", "version": 1, "modules": []}')
    for name, reason in (
        (
            "other.json",
            "is nothing that `lorasurgery select` has written. Check the path of --keep.",
        ),
        ("none.json", "No such file or directory. Check the path of --keep."),
    ):
        with pytest.raises(FormatError) as bad:
            Kept.read(tmp_path / name)
        assert str(bad.value) == f"{tmp_path / name}: {reason}"


def test_select_is_typed_and_train_takes_its_file(base, tmp_path):
    def surgery(*arguments: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, (result.stderr, result.exception)
        return result.stdout

    small = (
        "--data",
        TEXT,
        "--length",
        48,
        "--rank",
        4,
        "--batch",
        2,
        "--device",
        "cpu",
        "--lr",
        1e-2,
    )
    file = tmp_path / "keep.json"
    how = ("--steps", 2, "--sample", 0.05, "--over", "all", "-T", 0.7)
    said = surgery(
        "select", base, *small, *how, "-o", file, "--plot", tmp_path / "heat.png"
    ).splitlines()
    assert said[0].split() == ["module", "importance", "kept"]
    assert len(said[1:8]) == 7
    assert all(" of 2" in line for line in said[1:8])
    assert said[-1].startswith(f"wrote {file} in ")
    assert (tmp_path / "heat.png").read_bytes()[:4] == b"\x89PNG"
    found = Kept.read(file)
    assert (found.said["threshold"], found.said["over"], found.said["steps"]) == (0.7, "all", 2)
    assert 0 < len(found.keep) < 14
    surgery(
        "train",
        base,
        *small,
        "--steps",
        2,
        "-m",
        "lora-drop",
        "--keep",
        file,
        "-o",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "adapter.json").is_file()
    again = CliRunner().invoke(app, [str(a) for a in ("select", base, *small, *how, "-o", file)])
    assert isinstance(again.exception, LoraSurgeryError | SystemExit)
    assert f"{file}: is there already. Pass --overwrite, or name another file." in again.stderr


def test_a_layer_sees_what_it_gets_without_padding(base):
    """Rows of one batch are padded; the sample is seen one by one."""
    examples = [Example("a", (5, 6, 7), (5, 6, 7)), Example("b", (8, 9), (8, 9))]
    assert collate(examples, 0).tokens.shape == (2, 3)
    prepared = begin(base, options("lora"))
    _, tokens = _moments(prepared.trainer, examples)
    assert tokens == 5
