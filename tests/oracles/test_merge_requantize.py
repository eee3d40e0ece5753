"""Merging into NF4 and quantizing again: each policy writes what it promises, or is refused.

The expected values come from bitsandbytes' own (de)quantization.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from merging import changes, done, retained, surgery
from packed import Quantized, all_decoded, decoded, quantize
from peft import PeftModel
from tiny import TOKENS, outputs, tensors
from transformers import AutoModelForCausalLM


def test_a_rehearsal_predicts_what_requantizing_would_keep(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    flags = ("--requantize", "rtn", "--min-retained", "0")
    told = done("merge", base.path, adapter, "--dry-run", "--json", *flags).stdout
    assert list(tmp_path.iterdir()) == []
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    delta = changes(adapter)
    kept = retained(
        all_decoded(base.path, [*delta]), all_decoded(tmp_path / "merged", [*delta]), delta
    )
    assert json.loads(told)["total"]["retained"] == pytest.approx(kept, abs=0.02)


@pytest.mark.parametrize("policy", ["rtn", "keep-absmax"])
def test_a_policy_that_would_lose_the_change_is_refused_and_says_what_keeps_it(
    quantized: Quantized, tmp_path: Path, policy: str
) -> None:
    _, base, adapter = quantized
    flags = ("-o", tmp_path / "merged", "--requantize", policy)
    result = surgery("merge", base.path, adapter, *flags)
    assert result.exit_code == 3
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in ("--min-retained 0.9", "--requantize residual", "stochastic"):
        assert word in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_rtn_writes_what_bitsandbytes_makes_of_the_float32_sum(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    flags = ("--requantize", "rtn", "--min-retained", "0")
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    found, delta = tensors(tmp_path / "merged"), changes(adapter)
    for name, change in delta.items():
        codes, state = quantize(decoded(base.path, name).float() + change.float())
        # a sum that lies on the border of two codes may fall to either side
        assert (codes != found[name]).float().mean() < 0.001, name
        wanted = bnb.dequantize_4bit(codes, state)
        close = torch.isclose(decoded(tmp_path / "merged", name, torch.float32), wanted, rtol=1e-5)
        assert close.float().mean() > 0.999, name


def test_keep_absmax_leaves_every_scale_and_takes_the_nearest_code(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    flags = ("--requantize", "keep-absmax", "--min-retained", "-1")
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    before, after, delta = tensors(base.path), tensors(tmp_path / "merged"), changes(adapter)
    scales = [name for name in before if "absmax" in name or "quant_" in name]
    assert len(scales) > 40
    assert all(torch.equal(before[name], after[name]) for name in scales)
    code = bnb.get_4bit_type("nf4", device="cpu").float()
    for name, change in delta.items():
        target = (decoded(base.path, name).float() + change.float()).reshape(-1, 64)
        got = decoded(tmp_path / "merged", name, torch.float32).reshape(-1, 64)
        # the largest of a block has code 1 or -1, so that a block tells its scale
        w = decoded(base.path, name, torch.float32)
        scale = w.reshape(-1, 64).abs().amax(1, keepdim=True)
        nearest = (target[..., None] - scale[..., None] * code).abs().amin(-1)
        assert ((got - target).abs() <= nearest + 1e-6 * scale).all(), name


def test_rounded_by_chance_the_whole_change_is_there_on_average_and_the_seed_repeats_it(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    for run, seed in (("a", 1), ("again", 1), ("b", 2)):
        flags = ("--requantize", "stochastic", "--seed", seed)
        done("merge", base.path, adapter, "-o", tmp_path / run, *flags)
    a, again, b = (tensors(tmp_path / run) for run in ("a", "again", "b"))
    assert all(torch.equal(t, again[name]) for name, t in a.items())
    assert any(not torch.equal(t, b[name]) for name, t in a.items())
    delta = changes(adapter)
    kept = retained(all_decoded(base.path, [*delta]), all_decoded(tmp_path / "a", [*delta]), delta)
    # noise of 5 times the change over 73728 weights: a standard deviation of 2 %
    assert kept == pytest.approx(1, abs=0.08)


def test_from_original_quantizes_the_original_and_the_change_once(
    quantized: Quantized, tmp_path: Path
) -> None:
    original, base, adapter = quantized
    flags = ("--requantize", "from-original", "--original", original.path)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    found, before = tensors(tmp_path / "merged"), tensors(original.path)
    delta = changes(adapter)
    for name, change in delta.items():
        codes, _ = quantize(before[name].float() + change.float())
        assert (codes != found[name]).float().mean() < 0.002, name
    kept = retained(
        all_decoded(base.path, [*delta]), all_decoded(tmp_path / "merged", [*delta]), delta
    )
    assert kept == pytest.approx(1, abs=0.1)


def test_residual_keeps_the_change_in_a_small_adapter_that_peft_loads_on_top(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    flags = ("--requantize", "residual", "--rank", "16")
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    delta = changes(adapter)
    before = {name: decoded(base.path, name).float() for name in delta}
    bare = all_decoded(tmp_path / "merged", [*delta])
    rest = changes(tmp_path / "merged/residual_adapter", 1.0)
    assert rest.keys() == delta.keys()
    after = {name: bare[name] + rest[name] for name in delta}
    assert retained(before, bare, delta) < 0.3
    assert retained(before, after, delta) == pytest.approx(1, abs=0.1)
    for name, change in delta.items():
        lost = (before[name] + change - bare[name]).double()
        left = (before[name] + change - after[name]).double()
        # no rank-16 matrix comes nearer (Eckart, Young 1936)
        best = torch.linalg.svdvals(lost)[16:].square().sum().sqrt()
        assert left.norm() == pytest.approx(float(best), rel=0.02)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded = PeftModel.from_pretrained(model, tmp_path / "merged/residual_adapter").eval()
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter)
    plain = AutoModelForCausalLM.from_pretrained(base.path)
    wanted, found, without = (outputs(m.eval()).float() for m in (trained, loaded, plain))
    # what rank 16 leaves out is about half of the change, and all three models round to 16 bits
    assert (found - wanted).norm() < 0.8 * (without - wanted).norm()


@pytest.mark.parametrize(
    "flags",
    [
        ("rtn", "--min-retained", "0"), ("keep-absmax", "--min-retained", "-1"),
        ("stochastic", "--seed", "1"), ("residual", "--rank", "4", "--min-retained", "0"),
        ("from-original", "--original"),
    ],
    ids=lambda flags: flags[0],
)  # fmt: skip
def test_every_policy_writes_a_model_that_transformers_loads_as_nf4_and_generates_from(
    quantized: Quantized, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    original, base, adapter = quantized
    rest = (original.path,) if flags[-1] == "--original" else ()
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--requantize", *flags, *rest)
    before, after = tensors(base.path), tensors(tmp_path / "merged")
    assert {n: (t.dtype, t.shape) for n, t in after.items() if "quant_state" not in n} == {
        n: (t.dtype, t.shape) for n, t in before.items() if "quant_state" not in n
    }
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    tokens = model.generate(TOKENS[:1], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, TOKENS.shape[1] + 5)
