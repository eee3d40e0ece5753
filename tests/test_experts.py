"""Experts one by one and stacked: golden numbers, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algebra import cli, fails
from handmade import adapter, delta, lora, numbers, site
from safetensors.numpy import load_file, save_file

from lorasurgery.adapter import AdapterConfig, Site
from lorasurgery.dialects import peft
from lorasurgery.errors import MatchError
from lorasurgery.model import Model, open_model
from lorasurgery.operations.layouts.experts_single import single
from lorasurgery.operations.layouts.experts_stacked import stacked

EXPERTS, HIDDEN, WIDE = 3, 8, 5
AT = "model.layers.0.mlp.experts"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return open_model(base(tmp_path / "base"))


def base(path: Path, kind: str = "qwen3_moe", *, fused: bool = False, **config: Any) -> Path:
    """One layer of experts in float32, one by one or stacked."""
    path.mkdir()
    said = {"model_type": kind, "num_experts": EXPERTS, **config}
    (path / "config.json").write_text(json.dumps(said))
    held = {}
    if fused:
        held[f"{AT}.gate_up_proj"] = numbers((EXPERTS, 2 * WIDE, HIDDEN))
        held[f"{AT}.down_proj"] = numbers((EXPERTS, HIDDEN, WIDE), 1)
    for e in range(0 if fused else EXPERTS):
        for i, name in enumerate(("gate_proj", "up_proj")):
            held[f"{AT}.{e}.{name}.weight"] = numbers((WIDE, HIDDEN), 10 * e + i)
        held[f"{AT}.{e}.down_proj.weight"] = numbers((HIDDEN, WIDE), 10 * e + 2)
    save_file(held, path / "model.safetensors", {"format": "pt"})
    return path


def stack(parameter: str = "gate_up_proj", config: AdapterConfig | None = None) -> Site:
    config = config or AdapterConfig("lora", 2, 6.0)
    out, in_ = (2 * WIDE, HIDDEN) if parameter == "gate_up_proj" else (HIDDEN, WIDE)
    factors = {
        "A": numbers((EXPERTS, config.rank, in_), 3),
        "B": numbers((EXPERTS, out, config.rank), 4),
    }
    made = site(AT, config, factors, layout="experts")
    return Site(AT, parameter, "experts", config, made.factors, made.load)


def test_peft_files_have_the_expert_slowest_in_a_and_fastest_in_b(tmp_path):
    """Golden numbers: expert e, rank k, column c is 100 e + 10 k + c, wherever it is stored."""
    a = np.array(
        [[[100 * e + 10 * k + c for c in range(HIDDEN)] for k in range(2)] for e in range(3)]
    )
    b = np.array([[[100 * e + 10 * k + o for k in range(2)] for o in range(10)] for e in range(3)])
    factors = {"A": a.astype(np.float32), "B": b.astype(np.float32)}
    made = site(AT, AdapterConfig("lora", 2, 6.0), factors, layout="experts")
    made = Site(AT, "gate_up_proj", "experts", made.config, made.factors, made.load)
    peft.write(adapter([made]), tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    stored_a = held[f"base_model.model.{AT}.lora_A.weight"]
    stored_b = held[f"base_model.model.{AT}.lora_B.weight"]
    # rows of A: both ranks of expert 0, both of expert 1, ...
    assert stored_a[:, 0].tolist() == [0, 10, 100, 110, 200, 210]
    # columns of B: the first rank of all experts, then the second
    assert stored_b[0].tolist() == [0, 100, 200, 10, 110, 210]
    (again,) = peft.read(tmp_path).sites
    np.testing.assert_array_equal(again.load()["A"], a)
    np.testing.assert_array_equal(again.load()["B"], b)


def test_a_stack_becomes_the_modules_of_its_experts_which_share_a(model):
    made = adapter([stack(), stack("down_proj")])
    found = {s.module: s for s in single(made, model).adapter.sites}
    assert list(found) == [
        *(f"{AT}.{e}.{p}" for e in range(EXPERTS) for p in ("gate_proj", "up_proj")),
        *(f"{AT}.{e}.down_proj" for e in range(EXPERTS)),
    ]
    for e in range(EXPERTS):
        gate, up = (found[f"{AT}.{e}.{p}"] for p in ("gate_proj", "up_proj"))
        np.testing.assert_array_equal(gate.load()["A"], up.load()["A"])
        whole = delta(made.sites[0])[e]
        np.testing.assert_array_equal(np.concatenate([delta(gate), delta(up)]), whole)
        np.testing.assert_array_equal(delta(found[f"{AT}.{e}.down_proj"]), delta(made.sites[1])[e])
    again = stacked(single(made, model).adapter, model).adapter.sites
    for before, after in zip(made.sites, again, strict=True):
        assert (after.module, after.parameter, after.config) == (
            before.module, before.parameter, before.config,
        )  # fmt: skip
        for name in "AB":
            np.testing.assert_array_equal(after.load()[name], before.load()[name])


def test_factors_of_the_transpose_are_turned(model):
    """PEFT before 0.19 took [experts, out, in] for [experts, in, out]."""
    config = AdapterConfig("lora", 2, 6.0)
    factors = {"A": numbers((EXPERTS, 2, 2 * WIDE), 3), "B": numbers((EXPERTS, HIDDEN, 2), 4)}
    made = site(AT, config, factors, layout="experts")
    turned = Site(AT, "gate_up_proj", "experts", config, made.factors, made.load)
    found = {s.module: s for s in single(adapter([turned]), model).adapter.sites}
    for e in range(EXPERTS):
        both = [delta(found[f"{AT}.{e}.{p}"]) for p in ("gate_proj", "up_proj")]
        np.testing.assert_array_equal(np.concatenate(both), delta(turned)[e].T)


def test_experts_that_are_not_adapted_get_zeros_in_the_stack(model):
    some = lora(f"{AT}.2.up_proj", WIDE, HIDDEN, AdapterConfig("lora", 3, 4.5))
    other = lora(f"{AT}.0.gate_proj", WIDE, HIDDEN, AdapterConfig("lora", 1, 2.0))
    found = stacked(adapter([some, other]), model)
    (made,) = found.adapter.sites
    assert found.notes == (
        "1 stacks of 3 experts: 0 at the rank of their parts; 1 at the sum of gate's and up's, whose A differ",
    )
    assert made.config == AdapterConfig("lora", 4, 4.0)
    whole = np.zeros((EXPERTS, 2 * WIDE, HIDDEN))
    whole[2, WIDE:], whole[0, :WIDE] = delta(some), delta(other)
    np.testing.assert_array_equal(delta(made), whole)


def test_modules_of_mixtral_are_named_as_its_checkpoints_name_them(tmp_path):
    path = base(tmp_path / "fused", "mixtral", fused=True)
    found = single(adapter([stack("down_proj")]), open_model(path)).adapter.sites
    assert [s.module for s in found] == [
        f"model.layers.0.block_sparse_moe.experts.{e}.w2" for e in range(EXPERTS)
    ]
    (again,) = stacked(adapter(found), open_model(path)).adapter.sites
    assert (again.module, again.parameter) == (AT, "down_proj")


def refused(work: Any, sites: list[Site], model: Model | None) -> str:
    with pytest.raises(MatchError) as error:
        work(adapter(sites), model)
    return str(error.value).removeprefix("made/by-hand: ")


def test_what_cannot_be_relaid_is_refused_in_one_line(model, tmp_path):
    plain = lora("m.q_proj", 4, 6)
    one = lora(f"{AT}.0.down_proj", HIDDEN, WIDE)
    base_needed = "how many experts there are, and what they are called, only the base tells. Pass --base DIR."
    assert refused(single, [stack()], None) == base_needed
    assert refused(stacked, [one], None) == base_needed
    assert refused(single, [plain], model) == (
        "none of its sites is a stack of experts. Leave --experts out."
    )
    assert refused(stacked, [plain], model) == (
        "none of its modules is one expert of several. Leave --experts out."
    )
    assert refused(stacked, [lora(f"{AT}.3.down_proj", HIDDEN, WIDE)], model) == (
        f"{AT}.3.down_proj is adapted, but the base has 3 experts. Check --base."
    )
    dora = lora(f"{AT}.1.down_proj", HIDDEN, WIDE, AdapterConfig("dora", 3, 6.0))
    assert refused(stacked, [one, dora], model) == (
        f"{AT}.1.down_proj is a dora of [8, 5]: stacks are of lora, and of one size, which is [8, 5] in "
        f"{AT}.0.down_proj. Leave --experts out."
    )
    oss = open_model(base(tmp_path / "oss", "gpt_oss"))
    assert refused(single, [stack()], oss) == (
        "gpt_oss has its experts stacked alone, so that there are no modules for one of them. Leave --experts "
        "out."
    )
    bare = open_model(base(tmp_path / "bare", num_experts=None))
    assert refused(single, [stack()], bare) == (
        f"{bare.path}'s config.json does not say how many experts it has (num_local_experts, num_experts, "
        "n_routed_experts, moe_num_experts). Check --base."
    )


def test_experts_of_other_sizes_than_the_bases_are_refused(model):
    made = stack()
    assert refused(single, [replace(made, parameter="down_proj")], model) == (
        f"{AT}.down_proj is of experts of [10, 8], and {model.path} has them of [8, 5]. Check --base."
    )
    assert refused(single, [replace(made, module="model.layers.7.mlp.experts")], model) == (
        f"model.layers.7.mlp.experts.gate_up_proj is adapted, but {model.path} has no such experts. Check "
        "--base."
    )


def test_what_is_no_lora_of_all_experts_is_not_taken_apart(model):
    dora = replace(stack(), config=AdapterConfig("dora", 2, 6.0))
    assert refused(single, [dora], model) == (
        f"{AT}.gate_up_proj is a dora of a stack of 3 experts, and what can be taken apart is a lora of the base's "
        "3. Leave --experts out."
    )


def test_each_stack_is_read_once_however_many_its_experts_are(model):
    read = []

    def counting(of: Site) -> Site:
        return replace(of, load=lambda: read.append(of.parameter) or of.load())

    made = adapter([counting(stack()), counting(stack("down_proj"))])
    for one in single(made, model).adapter.sites:
        one.load()
    assert read == ["gate_up_proj", "down_proj"]


def test_a_stack_becomes_no_variant_of_one_matrix_unless_it_is_taken_apart(model, tmp_path):
    source, out = tmp_path / "it", tmp_path / "out"
    source.mkdir()
    peft.write(adapter([stack()]), source)
    for to in ("dora", "adalora"):
        _, message = fails("convert", source, "-o", out, "--base", model.path, "--to", to)
        assert message == (
            f"{source}: {AT}.gate_up_proj is a stack of experts, and a {to} is of one matrix. Pass --experts "
            "single, or --to lora."
        )
    code, _, stderr = cli(
        "convert", source, "-o", out, "--base", model.path, "--to", "adalora", "--experts", "single"
    )
    assert code == 0, stderr
    assert {s.config.variant for s in peft.read(out).sites} == {"adalora"}
