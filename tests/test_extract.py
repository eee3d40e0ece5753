"""extract as typed: what merge puts in is found again, and all that a LoRA cannot say is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import cli, deltas, dense, facts, fails
from safetensors.torch import load_file, save_file
from small import HIDDEN, RANK, VOCAB, WIDE, adapter, base, tensors

from lorasurgery import plugins
from lorasurgery.operations.algebra.into import Takes, takes


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base in float32, an adapter of ten percent, and the merge of the two."""
    old, lora = base(tmp_path / "base", torch.float32), adapter(tmp_path / "lora", size=10)
    new = tmp_path / "merged"
    facts("merge", old, lora, "-o", new)
    return old, lora, new


@pytest.mark.parametrize("flags", [(), ("--exact",)])
def test_what_was_merged_is_found_again(models, tmp_path: Path, flags: tuple[str, ...]) -> None:
    old, lora, new = models
    found = facts("extract", old, new, "-o", tmp_path / "out", "--rank", RANK, *flags)
    wanted, got = deltas(lora), deltas(tmp_path / "out")
    assert got.keys() == wanted.keys()
    for name, d in wanted.items():
        # W + D was rounded to float32, where W is ten times as large as D
        assert np.linalg.norm(got[name] - d) < 1e-5 * np.linalg.norm(d)
    assert found["total"]["relative_error"] < 1e-5
    assert found["total"]["left_out"] == 0


def test_the_stated_error_is_the_one_that_is_made(models, tmp_path: Path) -> None:
    old, lora, new = models
    found = facts("extract", old, new, "-o", tmp_path / "out", "--rank", 2, "--exact")
    got = deltas(tmp_path / "out")
    for name, d in deltas(lora).items():
        values = np.linalg.svd(d, compute_uv=False)
        best = np.sqrt((values[2:] ** 2).sum()) / np.linalg.norm(d)
        error = np.linalg.norm(got[name] - d) / np.linalg.norm(d)
        assert error == pytest.approx(best, rel=1e-4)
        assert found["tensors"][f"{name}.weight"]["relative_error"] == pytest.approx(
            error, rel=1e-4
        )


def test_random_directions_come_close_to_the_whole_svd(tmp_path: Path) -> None:
    """A change with a slowly falling spectrum, and sizes at which the subspace is really sought."""
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.standard_normal((200, 120)))
    v, _ = np.linalg.qr(rng.standard_normal((120, 120)))
    d = (u * (1 + np.arange(120)) ** -0.7) @ v.T
    errors = {}
    for folder, w in (("a", 0 * d), ("b", d)):
        (tmp_path / folder).mkdir()
        save_file({"l.weight": torch.tensor(w).float()}, tmp_path / folder / "model.safetensors")
    for flags in ((), ("--exact",)):
        run = facts("extract", tmp_path / "a", tmp_path / "b", "--dry-run", "--rank", 16, *flags)
        errors[flags] = run["total"]["relative_error"]
    values = (1.0 + np.arange(120)) ** -0.7
    assert errors["--exact",] == pytest.approx(
        np.sqrt((values[16:] ** 2).sum() / (values**2).sum()), rel=1e-5
    )
    assert errors["--exact",] <= errors[()] < 1.001 * errors["--exact",]


def test_energy_sets_the_rank_of_each_module(models, tmp_path: Path) -> None:
    old, lora, new = models
    facts("extract", old, new, "-o", tmp_path / "out", "--energy", "0.7")
    for name, d in deltas(lora).items():
        squares = np.linalg.svd(d, compute_uv=False) ** 2
        rank = int(np.argmax(np.cumsum(squares) / squares.sum() >= 0.7)) + 1
        assert len(dense(tmp_path / "out")[name][0]) == rank


def changed(old: Path, folder: Path) -> Path:
    """The base with a new norm, bias and embedding, one weight of rank 1 more, and one new tensor."""
    folder.mkdir()
    held = load_file(old / "model.safetensors")
    held["model.layers.0.input_layernorm.weight"] += 1
    held["model.layers.1.self_attn.q_proj.bias"] += 1
    held["model.layers.1.self_attn.q_proj.weight"] += 0.1
    held["model.embed_tokens.weight"] = torch.ones(VOCAB + 2, HIDDEN)
    held["score.weight"] = torch.ones(3, HIDDEN)
    save_file(held, folder / "model.safetensors")
    (folder / "config.json").write_text((old / "config.json").read_text())
    return folder


def test_what_has_no_low_rank_is_named(tmp_path: Path) -> None:
    old = base(tmp_path / "base", torch.float32)
    new, out = changed(old, tmp_path / "new"), tmp_path / "out"
    found = facts("extract", old, new, "-o", out)
    left = "left out (--save-others keeps it whole)."
    assert sorted(found["notes"]) == sorted([
        f"model.embed_tokens.weight: was [{VOCAB}, {HIDDEN}], is [{VOCAB + 2}, {HIDDEN}]; {left}",
        f"model.layers.0.input_layernorm.weight: changed, and is no matrix that is adapted; {left}",
        f"model.layers.1.self_attn.q_proj.bias: changed, and is no matrix that is adapted; {left}",
        f"score.weight: is new, [3, {HIDDEN}]; {left}",
    ])  # fmt: skip
    assert found["total"]["left_out"] == 4
    assert list(found["tensors"]) == ["model.layers.1.self_attn.q_proj.weight"]
    assert set(deltas(out)) == {"model.layers.1.self_attn.q_proj"}


def test_what_has_no_low_rank_is_kept_whole_and_merges_to_the_tuned_model(tmp_path: Path) -> None:
    old = base(tmp_path / "base", torch.float32)
    new, out, again = changed(old, tmp_path / "new"), tmp_path / "out", tmp_path / "again"
    found = facts("extract", old, new, "-o", out, "--save-others")
    assert (found["total"]["saved_whole"], found["total"]["left_out"]) == (4, 0)
    code, _, stderr = cli("merge", old, out, "-o", again)
    assert code == 0, stderr
    wanted, got = (load_file(d / "model.safetensors") for d in (new, again))
    assert wanted.keys() == got.keys()
    for name, w in wanted.items():
        torch.testing.assert_close(got[name], w, atol=1e-6, rtol=0)


def test_a_change_in_an_nf4_base_is_seen_through_its_weights(models, tmp_path: Path) -> None:
    old, lora, _ = models
    facts("quantize", old, "-o", tmp_path / "nf4")
    facts("merge", tmp_path / "nf4", lora, "-o", tmp_path / "merged4", "--dtype", "float32")
    facts("extract", tmp_path / "nf4", tmp_path / "merged4", "-o", tmp_path / "out", "--rank", RANK)
    got = deltas(tmp_path / "out")
    for name, d in deltas(lora).items():
        assert np.linalg.norm(got[name] - d) < 1e-5 * np.linalg.norm(d)


def test_an_embedding_and_stacked_experts_merge_back(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    held = {
        "model.embed_tokens.weight": torch.randn(30, 8, generator=rng),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 8, 12, generator=rng),
    }
    change = {
        "model.embed_tokens.weight": torch.randn(30, 2, generator=rng)
        @ torch.randn(2, 8, generator=rng),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 8, 2, generator=rng)
        @ torch.randn(3, 2, 12, generator=rng),
    }
    for folder, w in (("a", held), ("b", {n: held[n] + change[n] for n in held})):
        (tmp_path / folder).mkdir()
        save_file(w, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    facts("extract", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "out", "--rank", 2)
    facts("merge", tmp_path / "a", tmp_path / "out", "-o", tmp_path / "c")
    got = load_file(tmp_path / "c" / "model.safetensors")
    for name, w in held.items():
        torch.testing.assert_close(got[name], w + change[name], atol=1e-5, rtol=0)


def test_surgery_json_names_the_base_by_its_bytes(models, tmp_path: Path) -> None:
    old, lora, new = models
    facts("extract", old, new, "-o", tmp_path / "out")
    said = json.loads((tmp_path / "out" / "surgery.json").read_text())
    merged = json.loads((new / "surgery.json").read_text())
    assert said["base"] == str(old)
    # merge has read the same tensors of the same base
    assert said["base_fingerprint"] == merged["base_fingerprint"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(old))
    assert (config["r"], lora.name) == (16, "lora")


def test_errors(tmp_path: Path) -> None:
    old = base(tmp_path / "base")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"x.weight": torch.ones(4, 4)}, other / "model.safetensors")
    assert fails("extract", old, other, "--dry-run") == (
        1,
        f"{other}: has no weight matrix in common with {old}. Check that one was made of the other.",
    )
    assert fails("extract", old, old, "--dry-run", "--rank", 0) == (
        1, "--rank 0: is no rank. Pass 1 or more.",
    )  # fmt: skip
    assert fails("extract", old, old, "-o", tmp_path / "out") == (
        1, f"{old}: nothing is left of it to write. Ask for less to go.",
    )  # fmt: skip
    broken = tmp_path / "broken"
    broken.mkdir()
    held = tensors()
    held["lm_head.weight"][1, 2] = float("nan")
    save_file(held, broken / "model.safetensors")
    assert fails("extract", old, broken, "--dry-run") == (
        1,
        f"lm_head.weight: the difference of {broken} and {old} is nan or infinite. Look for it in both.",
    )
    assert WIDE > HIDDEN


EXTRACTED = [
    n
    for n in plugins.names("adapters")
    if takes(n) is not Takes.NOTHING and not hasattr(plugins.load("adapters", n), "ROUTED")
]


@pytest.mark.parametrize("variant", EXTRACTED)
def test_what_is_extracted_as_a_variant_merges_with_the_stated_error(
    models, tmp_path: Path, variant: str
) -> None:
    """Every variant that is near some change; none is farther than the LoRA where it has one."""
    old, _, new = models
    out, again = tmp_path / "out", tmp_path / "again"
    found = facts("extract", old, new, "-o", out, "--rank", 2, "--exact", "--variant", variant)
    facts("merge", old, out, "-o", again)
    held = [load_file(folder / "model.safetensors") for folder in (old, new, again)]
    off = whole = 0.0
    for name, w in held[0].items():
        wanted, got = (held[i][name].double() - w.double() for i in (1, 2))
        off, whole = (
            off + float((got - wanted).square().sum()),
            whole + float(wanted.square().sum()),
        )
    stated = found["total"]["relative_error"]
    assert (off / whole) ** 0.5 == pytest.approx(stated, rel=1e-3, abs=1e-5)
    plain = facts("extract", old, new, "--dry-run", "--rank", 2, "--exact")["total"]
    if takes(variant) is Takes.EXACTLY:
        assert stated <= plain["relative_error"] * (1 + 1e-4)
    else:
        assert plain["relative_error"] < stated < 1
    assert found["total"]["modules"] == 6


def test_a_dora_holds_more_of_scaled_rows_than_a_lora(tmp_path: Path) -> None:
    old, rng = base(tmp_path / "base", torch.float32), torch.Generator().manual_seed(4)
    held = load_file(old / "model.safetensors")
    for name in held:
        if name.endswith("up_proj.weight"):
            w = held[name]
            w *= 1 + 0.3 * torch.rand(len(w), 1, generator=rng)
    (tmp_path / "new").mkdir()
    save_file(held, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text((old / "config.json").read_text())
    errors = {
        variant: facts(
            "extract", old, tmp_path / "new", "--dry-run", "--rank", 2, "--variant", variant
        )["total"]["relative_error"]
        for variant in ("lora", "dora", "lora_rowscale")
    }
    assert errors["dora"] < 0.5 * errors["lora"]
    assert errors["lora_rowscale"] < 0.5 * errors["lora"]


def test_a_variant_that_is_near_to_nothing_is_refused(models, tmp_path: Path) -> None:
    old, _, new = models
    for variant in ("pissa", "oft", "ia3", "moral"):
        assert fails("extract", old, new, "-o", tmp_path / "out", "--variant", variant) == (
            1,
            f"--variant {variant}: has no factors that are near any change. Take lora or another; "
            "lorasurgery convert --explain shows them.",
        )
    assert fails("extract", old, new, "-o", tmp_path / "out", "--variant", "dorra") == (
        1, "adapters: no 'dorra'. Did you mean 'dora'?",
    )  # fmt: skip


def test_what_another_variant_knows_nothing_of_is_named(tmp_path: Path) -> None:
    old = base(tmp_path / "base", torch.float32)
    held = load_file(old / "model.safetensors")
    held["model.embed_tokens.weight"] += 1
    held["model.layers.0.mlp.up_proj.weight"] += 1
    (tmp_path / "new").mkdir()
    save_file(held, tmp_path / "new" / "model.safetensors")
    (tmp_path / "new" / "config.json").write_text((old / "config.json").read_text())
    found = facts("extract", old, tmp_path / "new", "--dry-run", "--variant", "dora")
    assert list(found["tensors"]) == ["model.layers.0.mlp.up_proj.weight"]
    assert found["notes"] == [
        "model.embed_tokens.weight: changed, and is no matrix that is adapted; left out (--save-others "
        "keeps it whole)."
    ]
