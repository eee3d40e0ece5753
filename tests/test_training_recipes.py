"""`make train-135m` and `make saved-activations` on a small model, and what their committed results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import saved_activations, smollm2, train_135m
from lorasurgery.training import method as methods
from tests.training_case import TEXT, save_base

RESULTS = Path(train_135m.__file__).parent / "results"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("recipes") / "base")


def test_a_method_is_trained_from_select_to_its_bytes(base, tmp_path, capsys):
    job = train_135m.Job(base, tmp_path / "runs", steps=2, length=200)
    told = train_135m.made(job, ["lora-drop"])
    row = told["methods"]["lora-drop"]
    assert set(train_135m.methods(job)) - {"lora --qlora"} == set(methods.names())
    assert told["base_sha256"] == smollm2.digest(base)
    assert len(row["losses"]) == 2
    assert row["adapter_bytes"] == (tmp_path / "runs/lora-drop/adapter.safetensors").stat().st_size
    assert 0 < row["saved_bytes_of_base"] < row["saved_bytes"]
    # two steps at a small rate: near where it began, and not there
    assert told["loss_before"] == pytest.approx(row["eval_loss"], rel=0.05)
    assert told["loss_before"] != row["eval_loss"]
    assert f"| (the base) | | | | | {told['loss_before']:.4f} |" in capsys.readouterr().out


def test_the_table_of_what_is_kept_is_lora_fas_own_report(base, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_activations, "RANKS", (4,))
    monkeypatch.setattr(saved_activations, "TARGETS", {"q, v": ("q_proj", "v_proj")})
    (tmp_path / "text.txt").write_text(TEXT.read_text())
    (row,) = saved_activations.rows(base, tmp_path / "text.txt", 16)
    assert (row["targets"], row["rank"]) == ("q, v", 4)
    # q and v of two layers see x [4 · 16, 32]; of the first norm the base alone keeps as much and a number a token
    assert row["saved_bytes_of_lora_adapter"] == 4 * 64 * (2 * 32 - 33 + 4 * 4)
    assert row["saved_bytes_of_adapter"] == 4 * 64 * (4 * 4 - 33)
    assert saved_activations.table([row]).splitlines()[2].startswith("| q, v | 4 | ")


def test_the_committed_table_has_lora_fas_promise():
    rows = json.loads((RESULTS / "saved-activations.json").read_text())["rows"]
    found = {(row["targets"], row["rank"]): row for row in rows}
    assert list(found) == [("q, v", 8), ("q, v", 64), ("all linear", 8), ("all linear", 64)]
    every = found["all linear", 8]
    assert every["saved_bytes_of_adapter"] <= 0.05 * every["saved_bytes_of_lora_adapter"]
    assert every["saved_bytes"] <= 0.8 * every["saved_bytes_as_lora"]


def test_the_committed_run_has_the_counts_of_the_formulas():
    told = json.loads((RESULTS / "train-135m.json").read_text())
    # of the seven linear layers of each of thirty blocks
    sizes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    both, outs = 30 * sum(o + i for o, i in sizes), 30 * sum(o for o, _ in sizes)
    counts = {name: row["trained_parameters"] for name, row in told["methods"].items()}
    blocks = 30 * sum(o + i for o, i in sizes[4:])
    assert counts == {
        "lora": 8 * both, "lora+": 8 * both, "rslora": 8 * both, "dora": 8 * both + outs,
        "adalora": 12 * both + 210 * 12, "vera": outs + 210 * 64, "lora-fa": 8 * outs,
        "lora-drop": counts["lora-drop"], "delta-lora": 8 * both,
        "moral": 4 * 8 * blocks + 30 * 4 * 576, "lora --qlora": 8 * both,
    }  # fmt: skip
    assert 0 < counts["lora-drop"] < 8 * both
    assert counts["vera"] == 168_960
    assert told["methods"]["vera"]["adapter_bytes"] <= 750_000
    assert {row["base_parameters"] for row in told["methods"].values()} == {134_515_008}
