"""diff as typed: adapters, models, and adapters in models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import cli, deltas, facts, fails, write_lora
from safetensors.torch import load_file, save_file
from small import adapter, base


def test_two_adapters_differ_by_their_changes_not_their_factors(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "one", {"l.q": (20, 30, 3, 1.0), "l.k": (10, 12, 2, 1.0)})
    other = write_lora(tmp_path / "other", {"l.q": (20, 30, 4, 0.5), "l.v": (8, 9, 2, 1.0)}, seed=1)
    found = facts("diff", one, other)
    a, b = deltas(one)["l.q"], deltas(other)["l.q"]
    numbers = found["tensors"]["l.q.weight"]
    assert list(found["tensors"]) == ["l.q.weight"]
    assert numbers["difference"] == pytest.approx(
        np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6
    )
    assert numbers["cosine"] == pytest.approx(
        (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-5
    )
    assert (numbers["rank_before"], numbers["rank"]) == (3, 4)
    assert found["notes"] == [f"{one} alone has l.k.weight.", f"{other} alone has l.v.weight."]


def test_the_same_change_in_other_factors_is_no_difference(tmp_path: Path) -> None:
    one = write_lora(tmp_path / "one", {"l.q": (20, 30, 3, 1.0), "l.k": (10, 12, 2, 1.0)})
    facts("prune", one, "-o", tmp_path / "other", "--rank", 8)
    found = facts("diff", one, tmp_path / "other")
    # float32 factors of 3 products each
    assert found["total"]["difference"] < 1e-6
    assert found["total"]["modules"] == 2


def test_two_models_differ_tensor_by_tensor(tmp_path: Path) -> None:
    old = base(tmp_path / "old")
    new = tmp_path / "new"
    new.mkdir()
    held = load_file(old / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    w = held[name].float()
    held[name] = w.clone()
    held[name][3, 5] += 0.5
    held["extra"] = held.pop("lm_head.weight")
    held["model.layers.0.input_layernorm.weight"] = torch.ones(3)
    # the same numbers in another dtype
    held["model.layers.0.mlp.up_proj.weight"] = held["model.layers.0.mlp.up_proj.weight"].float()
    save_file(held, new / "model.safetensors")
    found = facts("diff", old, new)
    assert list(found["tensors"]) == [name]
    assert found["tensors"][name] == {
        "difference": pytest.approx(0.5 / w.norm().item(), rel=1e-5),
        "max_error": pytest.approx(0.5, rel=1e-6), "changed": 1 / w.numel(),
    }  # fmt: skip
    assert found["total"]["identical"] == found["total"]["tensors"] - 1
    assert found["notes"] == [
        f"model.layers.0.input_layernorm.weight: is [64] in {old}, [3] in {new}.",
        f"{old} alone has lm_head.weight.",
        f"{new} alone has extra.",
    ]
    same = facts("diff", old, old)
    assert (same["tensors"], same["total"]["difference"]) == ({}, 0)


def test_the_adapters_inside_a_model_are_told_from_those_that_are_not(tmp_path: Path) -> None:
    old = base(tmp_path / "base", torch.float32)
    a, b, c = (adapter(tmp_path / name, seed=i, size=5) for i, name in enumerate("abc"))
    code, _, stderr = cli("merge", old, a, f"{c}:-0.5", "-o", tmp_path / "merged")
    assert code == 0, stderr
    found = facts("diff", a, b, c, "--inside", tmp_path / "merged", "--base", old)
    got = [found["tensors"][f"{path}:1"]["coefficient"] for path in (a, b, c)]
    assert got == pytest.approx([1, 0, -0.5], abs=1e-4)
    assert found["total"]["explained"] == pytest.approx(1, abs=1e-6)
    alone = facts("diff", b, "--inside", tmp_path / "merged", "--base", old)
    # two random changes of this size have nearly nothing in common
    assert alone["total"]["explained"] < 0.05


def test_an_adapter_inside_a_bfloat16_model_is_seen_through_its_rounding(tmp_path: Path) -> None:
    old = base(tmp_path / "base")
    a, b = (adapter(tmp_path / name, seed=i, targets=("q_proj",)) for i, name in enumerate("ab"))
    cli("merge", old, f"{a}:2", "-o", tmp_path / "merged")
    found = facts("diff", a, b, "--inside", tmp_path / "merged", "--base", old)["tensors"]
    assert found[f"{a}:1"]["coefficient"] == pytest.approx(2, abs=0.1)
    assert found[f"{b}:1"]["coefficient"] == pytest.approx(0, abs=0.1)


def test_errors(tmp_path: Path) -> None:
    old, lora = base(tmp_path / "base"), adapter(tmp_path / "lora")
    other = write_lora(tmp_path / "other", {"l.q": (20, 30, 3, 1.0)})
    small = write_lora(tmp_path / "small", {"l.q": (20, 31, 3, 1.0)})
    assert fails("diff", lora) == (2, "diff: compares two, not 1. Pass two adapters or two models.")
    assert fails("diff", old, lora) == (
        2,
        f"diff: {lora} is an adapter, {old} is none. Compare two of a kind, or ask --inside.",
    )
    assert fails("diff", lora, other) == (
        1, f"{other}: adapts no module that {lora} adapts. Check that they are for one base.",
    )  # fmt: skip
    assert fails("diff", other, small) == (
        1,
        f"l.q.weight: {other} changes [20, 30], but {small} [20, 31]. They are for different bases.",
    )
    assert fails("diff", lora, "--inside", old) == (
        2, "diff: --inside MODEL needs what it was made of. Pass --base DIR.",
    )  # fmt: skip
    code, message = fails("diff", other, "--inside", old, "--base", old)
    assert code == 1
    assert message.startswith(f"{other}: l.q.weight is adapted, but {old} has no such tensor.")
