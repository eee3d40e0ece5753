"""Ranks chosen by what they do to outputs, against the inputs that PEFT's model gives its own modules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from merging import SCALE, factors, make_adapter
from packed import Quantized
from texts import (
    IDS,
    TEXT,
    add_tokenizer,
    changes,
    facts,
    fails,
    inputs,
    output_error,
    save,
)
from tiny import Base, make_base, tensors

WINDOW, RANK = 12, 2
LINEAR = ["q_proj", "o_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return add_tokenizer(make_base("llama", tmp_path_factory.mktemp("calibrate") / "base"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def best(delta: np.ndarray, x: np.ndarray, rank: int) -> float:
    """The discarded singular values of D L, with L Lᵀ = E[x xᵀ] = Xᵀ X / n."""
    values = np.linalg.svd(delta @ x.T / len(x) ** 0.5, compute_uv=False)
    return float((values[rank:] ** 2).sum() ** 0.5)


def check(base: Base, start: Path, out: Path, found: dict[str, Any], rank: int = RANK) -> None:
    """What is stated is what PEFT's modules get and give, and no matrix of this rank is nearer."""
    before, after, x = changes(base, start), changes(base, out), inputs(base, start, WINDOW)
    assert before.keys() == after.keys() == x.keys()
    for name, delta in before.items():
        said = found["tensors"][f"{name}.weight"]
        norm = output_error(delta, x[name])
        # float32 weights of about 1 and changes of as much, merged and subtracted again
        got = output_error(delta - after[name], x[name]) / norm
        assert got == pytest.approx(said["output_error"], rel=1e-3, abs=1e-5)
        assert said["output_error"] == pytest.approx(
            best(delta, x[name], rank) / norm, rel=1e-3, abs=1e-5
        )
        u, s, vt = np.linalg.svd(delta)
        plain = (u[:, :rank] * s[:rank]) @ vt[:rank]
        unweighted = output_error(delta - plain, x[name]) / norm
        assert said["unweighted_output_error"] == pytest.approx(unweighted, rel=1e-3, abs=1e-5)
        assert said["output_error"] <= unweighted * (1 + 1e-6)
        whole = np.linalg.norm(delta)
        assert said["unweighted_error"] == pytest.approx(
            np.linalg.norm(s[rank:]) / whole, rel=1e-3, abs=1e-5
        )
        assert said["relative_error"] == pytest.approx(
            np.linalg.norm(delta - after[name]) / whole, rel=1e-3, abs=1e-5
        )
        assert said["rank"] == rank


CONVERTED: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=5, lora_alpha=7, target_modules=LINEAR),
    "embedding": lambda: peft.LoraConfig(r=5, lora_alpha=7, target_modules=["embed_tokens", "q_proj"]),
    "dora": lambda: peft.LoraConfig(r=5, lora_alpha=7, target_modules=LINEAR, use_dora=True),
    "dora-embedding": lambda: peft.LoraConfig(
        r=5, lora_alpha=7, target_modules=["embed_tokens", "q_proj"], use_dora=True
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=LINEAR),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, r=0, target_modules=LINEAR),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONVERTED)
def test_no_lora_of_the_rank_changes_outputs_less(
    base: Base, text: Path, tmp_path: Path, kind: str
) -> None:
    start, out = save(base, CONVERTED[kind](), tmp_path / "start"), tmp_path / "out"
    found = facts(
        "convert", start, "-o", out, "--base", base.path, "--rank", RANK, "--exact",
        "--calibrate", text, "--window", WINDOW,
    )  # fmt: skip
    check(base, start, out, found)
    total, of = found["total"], found["tensors"].values()
    for key, norm in (("output_error", "output_norm2"), ("unweighted_error", "norm2")):
        square = sum(t[f"{key}2"] for t in of) / sum(t[norm] for t in of)
        assert total[key] == pytest.approx(square**0.5)
    assert total["output_error"] < total["unweighted_output_error"]
    assert total["relative_error"] > total["unweighted_error"]
    assert found["notes"] == [f"inputs are those of {len(IDS)} tokens of {text}, in windows of 12."]


def test_the_share_of_energy_is_that_of_the_outputs(base: Base, text: Path, tmp_path: Path) -> None:
    start, out = save(base, CONVERTED["lora"](), tmp_path / "start"), tmp_path / "out"
    found = facts(
        "convert", start, "-o", out, "--base", base.path, "--energy", 0.8, "--calibrate", text,
        "--window", WINDOW,
    )  # fmt: skip
    x = inputs(base, start, WINDOW)
    for name, delta in changes(base, start).items():
        values = np.linalg.svd(delta @ x[name].T, compute_uv=False) ** 2
        rank = int(np.argmax(np.cumsum(values) >= 0.8 * values.sum())) + 1
        assert found["tensors"][f"{name}.weight"]["rank"] == rank
        assert tensors(out)[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank


def test_turned_layers_have_the_same_inputs(tmp_path: Path, text: Path) -> None:
    gpt2 = add_tokenizer(make_base("gpt2", tmp_path / "gpt2"))
    start, out = tmp_path / "start", tmp_path / "out"
    make_adapter(gpt2, start, target_modules=["c_attn", "c_fc", "wte"], r=5, fan_in_fan_out=True)
    found = facts(
        "convert", start, "-o", out, "--base", gpt2.path, "--rank", RANK, "--calibrate", text,
        "--window", WINDOW,
    )  # fmt: skip
    check(gpt2, start, out, found)


def test_a_quantized_base_gives_the_inputs_that_it_has(
    quantized: Quantized, text: Path, tmp_path: Path
) -> None:
    _, nf4, start = quantized
    # transformers dequantizes by bitsandbytes in both; in float32, where this one is bfloat16
    base = replace(nf4, path=Path(shutil.copytree(nf4.path, tmp_path / "nf4")), dtype=torch.float32)
    add_tokenizer(base)
    found = facts(
        "convert", start, "--dry-run", "--base", base.path, "--rank", 1, "--calibrate", text,
        "--window", WINDOW,
    )  # fmt: skip
    x, held = inputs(base, start, WINDOW), factors(start)
    assert x.keys() == held.keys()
    for name, (a, b) in held.items():
        delta = (SCALE * b.double() @ a.double()).numpy()
        said = found["tensors"][f"{name}.weight"]["output_error"]
        wanted = best(delta, x[name], 1) / output_error(delta, x[name])
        assert said == pytest.approx(wanted, rel=1e-3)


def test_sums_that_memory_does_not_hold_are_gathered_in_passes(
    base: Base, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = save(base, CONVERTED["dora"](), tmp_path / "start")
    lines = (
        "convert",
        start,
        "--base",
        base.path,
        "--rank",
        RANK,
        "--dry-run",
        "--calibrate",
        text,
    )
    once = facts(*lines)
    # a module of 32 inputs needs 8 KiB of sums, one of 48 needs 18 KiB
    monkeypatch.setattr("lorasurgery.operations.activations.gather._MEMORY", 17 << 10)
    assert facts(*lines)["tensors"] == once["tensors"]


def test_only_so_many_tokens_are_read(base: Base, text: Path, tmp_path: Path) -> None:
    start = save(base, CONVERTED["lora"](), tmp_path / "start")
    short = tmp_path / "short.txt"
    short.write_text(" ".join(TEXT.split()[:40]))
    lines = ("convert", start, "--base", base.path, "--rank", RANK, "--dry-run", "--window", WINDOW)
    cut = facts(*lines, "--calibrate", text, "--tokens", 40)
    assert cut["tensors"] == facts(*lines, "--calibrate", short)["tensors"]
    assert cut["tensors"] != facts(*lines, "--calibrate", text)["tensors"]


def test_notes_say_what_the_inputs_leave_open(base: Base, text: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=5, target_modules=LINEAR, use_dora=True, modules_to_save=["lm_head"], lora_alpha=7
    )
    start = save(base, config, tmp_path / "start")
    notes = facts(
        "convert", start, "--base", base.path, "--rank", RANK, "--dry-run", "--calibrate", text,
        "--tokens", 20,
    )["notes"]  # fmt: skip
    assert notes == [
        f"inputs are those of 20 tokens of {text}, in windows of 512.",
        "they leave out what the adapter replaces or adds whole: lm_head.weight.",
        "20 tokens show less than the 48 directions of an input: more are better.",
    ]


def test_what_is_not_cut_is_kept_as_it_is(base: Base, text: Path, tmp_path: Path) -> None:
    start, out = save(base, CONVERTED["lora"](), tmp_path / "start"), tmp_path / "out"
    found = facts(
        "convert", start, "-o", out, "--base", base.path, "--rank", 5, "--calibrate", text
    )
    assert found["total"]["output_error"] == found["total"]["unweighted_output_error"] == 0
    held, was = tensors(out), tensors(start)
    assert held.keys() == was.keys()
    # the scale of 7 / 5 goes into B
    assert all(torch.equal(held[n], was[n]) for n in was if "lora_A" in n)
    assert all(
        torch.equal(held[n], torch.tensor(7 / 5, dtype=torch.float64).float() * was[n])
        for n in was
        if "lora_B" in n
    )


def test_errors_are_one_line_each(base: Base, text: Path, tmp_path: Path) -> None:
    start = save(base, CONVERTED["lora"](), tmp_path / "start")
    plain = ("convert", start, "--dry-run", "--rank", RANK)
    lines = (*plain, "--base", base.path)
    assert fails(*plain, "--calibrate", text) == (
        2, "error: --calibrate: runs the base on the text. Pass --base DIR.\n",
    )  # fmt: skip
    assert fails("convert", start, "--dry-run", "--base", base.path, "--calibrate", text) == (
        2,
        "error: --calibrate: weighs what is cut off, and nothing is. Pass --rank or --energy.\n",
    )
    assert fails(*lines, "--calibrate", text, "--projections", "split") == (
        2,
        "error: --calibrate: runs modules as they are. Convert once more for --projections and --experts.\n",
    )
    assert fails("convert", start, "--dry-run", "--for", "vllm", "--calibrate", text) == (
        2,
        "error: --for: decides on ranks, scale and layout itself. Take the others away.\n",
    )
    (tmp_path / "short.txt").write_text("w1")
    assert fails(*lines, "--calibrate", tmp_path / "short.txt") == (
        1,
        f"error: {tmp_path}/short.txt: is 1 tokens long, too short to calibrate with. Give more.\n",
    )
    (tmp_path / "bytes.txt").write_bytes(b"w1 w2 \xff")
    assert fails(*lines, "--calibrate", tmp_path / "bytes.txt") == (
        1, f"error: {tmp_path}/bytes.txt: byte 6 is not UTF-8. Pass --calibrate a text.\n",
    )  # fmt: skip


def test_a_module_without_inputs_is_named(tmp_path: Path, text: Path) -> None:
    crossed = make_base("gpt2", tmp_path / "gpt2")
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = json.loads((crossed.path / "config.json").read_text())
    config = GPT2Config(**settings | {"add_cross_attention": True})
    GPT2LMHeadModel(config).save_pretrained(crossed.path)
    add_tokenizer(crossed)
    start = make_adapter(
        crossed, tmp_path / "start", target_modules=["crossattention.c_proj"], fan_in_fan_out=True
    )
    assert fails(
        "convert", start, "--dry-run", "--base", crossed.path, "--rank", 1, "--calibrate", text,
        "--window", WINDOW,
    ) == (
        1,
        f"error: {start}: transformer.h.0.crossattention.c_proj.weight is never run on {text}, so that its "
        "inputs are not known. Leave out --calibrate.\n",
    )  # fmt: skip


def test_stacked_experts_are_refused(tmp_path: Path, text: Path) -> None:
    mixtral = add_tokenizer(make_base("mixtral", tmp_path / "mixtral"))
    start = make_adapter(
        mixtral, tmp_path / "start", target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj"],
    )  # fmt: skip
    assert fails(
        "convert", start, "--dry-run", "--base", mixtral.path, "--rank", 1, "--calibrate", text
    ) == (
        1,
        f"error: {start}: model.layers.0.mlp.experts.down_proj is no module's weight to transformers, and "
        "inputs are seen of linear layers and embeddings alone. Leave out --calibrate.\n",
    )
