"""Merged 16-bit weights are the sum rounded once; PEFT rounds up to twice, and loses what is too small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import (
    RANK,
    SCALE,
    changes,
    done,
    make_adapter,
    merged_by_peft,
    retained,
    rounded_once,
    same_weights,
    shrink,
    surgery,
)
from safetensors.torch import save_file
from tiny import Base, outputs, tensors

Bases = Callable[..., Base]


@pytest.mark.parametrize("factor", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16 base", "fp16 base"])
def test_a_16_bit_base_gets_the_float32_sum_rounded_once(
    bases: Bases, tmp_path: Path, dtype: torch.dtype, factor: torch.dtype
) -> None:
    base = bases("llama", dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    file = adapter / "adapter_model.safetensors"
    save_file({n: t.to(factor) for n, t in tensors(adapter).items()}, file, {"format": "pt"})
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    before, after = tensors(base.path), tensors(tmp_path / "merged")
    for name, delta in changes(adapter).items():
        assert after[name].dtype == dtype
        rounded_once(after[name], before[name], delta)
    # PEFT computes here in 16 bits with the same weights: only the model's own rounding differs
    wanted = outputs(merged_by_peft(base, (adapter, 1.0))).float()
    found = outputs(base.load(tmp_path / "merged")).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_embeddings_and_experts_are_rounded_once_where_peft_rounds_twice(
    bases: Bases, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = bases("mixtral-fused", dtype)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["embed_tokens"],
        target_parameters=["mlp.experts.gate_up_proj"],
    )  # fmt: skip
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    before, after, stored = (tensors(p) for p in (base.path, tmp_path / "merged", adapter))
    prefix, name = "base_model.model.model.", "model.embed_tokens.weight"
    a = stored[f"{prefix}embed_tokens.lora_embedding_A"].double()
    b = stored[f"{prefix}embed_tokens.lora_embedding_B"].double()
    rounded_once(after[name], before[name], SCALE * (b @ a).T)
    a = stored[f"{prefix}layers.0.mlp.experts.lora_A.weight"].double()
    b = stored[f"{prefix}layers.0.mlp.experts.lora_B.weight"].double()
    name, n = "model.layers.0.mlp.experts.gate_up_proj", 4
    # rows of A: expert by expert; columns of B: rank by rank, each with all experts
    delta = torch.stack([b[:, e::n] @ a[e * RANK : (e + 1) * RANK] for e in range(n)])
    rounded_once(after[name], before[name], SCALE * delta)
    theirs = dict(merged_by_peft(base, (adapter, 1.0)).named_parameters())[name]
    assert (theirs != after[name]).float().mean() > 0.05


def test_two_adapters_on_a_16_bit_base_are_rounded_once_together(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", torch.bfloat16)
    first = make_adapter(base, tmp_path / "first", target_modules=["q_proj"])
    second = make_adapter(base, tmp_path / "second", seed=2, target_modules=["q_proj"])
    done("merge", base.path, f"{first}:0.5", f"{second}:-1.5", "-o", tmp_path / "merged")
    before, after = tensors(base.path), tensors(tmp_path / "merged")
    other = changes(second, -1.5 * SCALE)
    for name, delta in changes(first, 0.5 * SCALE).items():
        rounded_once(after[name], before[name], delta + other[name])


def test_a_whole_module_trained_in_float32_is_rounded_to_the_dtype_of_the_base(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    stored = tensors(adapter)
    head = stored["base_model.model.lm_head.weight"].float() * 1.001
    stored["base_model.model.lm_head.weight"] = head
    save_file(stored, adapter / "adapter_model.safetensors", {"format": "pt"})
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    assert torch.equal(tensors(tmp_path / "merged")["lm_head.weight"], head.bfloat16())


def test_written_in_float32_the_sum_keeps_what_16_bits_would_lose(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--dtype", "float32")
    after, before = tensors(tmp_path / "merged"), tensors(base.path)
    for name, delta in changes(adapter).items():
        wanted = (before[name].double() + delta).float()
        torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-6)
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"
    wide = Base(base.path, base.auto, torch.float32)
    same_weights(wide.load(tmp_path / "merged"), merged_by_peft(wide, (adapter, 1.0)))


def test_what_rounding_loses_is_measured_and_said_with_what_would_keep_it(
    bases: Bases, tmp_path: Path
) -> None:
    # PEERS: a bf16 merge keeps 53 % of a change of 0.1 % of the weight, and says nothing
    base = bases("llama-nf4-sizes", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    shrink(adapter, base, 0.001)
    result = done("merge", base.path, adapter, "-o", tmp_path / "merged", "--json")
    before, delta = tensors(base.path), changes(adapter)
    kept = retained(before, tensors(tmp_path / "merged"), delta)
    assert 0.4 < kept < 0.7
    assert reported(result.stdout) == pytest.approx(kept, abs=1e-3)
    for cure in ("--dtype float32", "--rounding stochastic"):
        assert cure in result.stderr
    wide = (tmp_path / "wide", "--dtype", "float32")
    assert "--rounding" not in done("merge", base.path, adapter, "-o", *wide).stderr
    assert retained(before, tensors(tmp_path / "wide"), delta) == pytest.approx(1, abs=1e-3)


def test_what_rounding_would_lose_stops_the_command_where_a_least_is_given(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama-nf4-sizes", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    shrink(adapter, base, 0.001)
    flags = ("-o", tmp_path / "merged", "--min-retained", "0.9")
    result = surgery("merge", base.path, adapter, *flags)
    assert result.exit_code == 3
    assert "--dtype float32" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_rounded_by_chance_all_of_the_change_is_there_and_the_seed_decides(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama-nf4-sizes", torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    shrink(adapter, base, 0.001)
    runs = {}
    for run, seed in (("a", 1), ("again", 1), ("b", 2)):
        flags = ("--rounding", "stochastic", "--seed", seed)
        done("merge", base.path, adapter, "-o", tmp_path / run, *flags)
        runs[run] = tensors(tmp_path / run)
    before, delta = tensors(base.path), changes(adapter)
    # 114688 weights with noise of about 2.4 times the change: a standard deviation of 0.7 %
    assert retained(before, runs["a"], delta) == pytest.approx(1, abs=0.04)
    assert all(torch.equal(t, runs["again"][n]) for n, t in runs["a"].items())
    assert any(not torch.equal(t, runs["b"][n]) for n, t in runs["a"].items())
    for name, d in delta.items():  # one of the two neighbours, never another
        exact = before[name].double() + d
        error = (runs["a"][name].double() - exact).abs()
        assert (error <= 2.0**-7 * exact.abs() + 1e-9).all()


def reported(stdout: str) -> float:
    """The retained signal of the whole, from the JSON."""
    total: dict[str, Any] = json.loads(stdout)["total"]
    return float(total["retained"])
