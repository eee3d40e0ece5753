"""Merging into an NF4 base: what PEFT's merge loses silently is kept here, or refused.

PEFT dequantizes, adds and quantizes again; a change of 1 % of the weight is smaller than a step of the
code, and 98 % of it are gone. The expected values come from bitsandbytes' own (de)quantization.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from merging import (
    changes,
    done,
    merged_by_peft,
    retained,
    rounded_once,
    surgery,
)
from packed import Quantized, decoded
from peft import PeftModel
from tiny import Base, outputs, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM


def test_peft_itself_loses_the_change(quantized: Quantized) -> None:
    # why all of this is here; if it fails one day, PEFT has become better
    _, base, adapter = quantized
    model = AutoModelForCausalLM.from_pretrained(base.path)
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    delta = changes(adapter)
    after = {}
    for name in delta:
        weight = merged.get_submodule(name.removesuffix(".weight")).weight
        after[name] = bnb.dequantize_4bit(weight.data, weight.quant_state)
    before = {name: decoded(base.path, name) for name in delta}
    assert retained(before, after, delta) < 0.1


def test_without_requantizing_the_output_is_the_dequantized_weight_and_the_change_rounded_once(
    quantized: Quantized, tmp_path: Path
) -> None:
    _, base, adapter = quantized
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    after, delta = tensors(tmp_path / "merged"), changes(adapter)
    for name, change in delta.items():
        assert after[name].dtype == torch.bfloat16
        rounded_once(after[name], decoded(base.path, name), change)
    untouched = {name for name in tensors(base.path) if "proj" not in name}
    assert set(after) == untouched | set(delta)
    assert all(torch.equal(after[name], tensors(base.path)[name]) for name in untouched)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    # the model that the adapter was trained as: NF4 below, the adapter beside it
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), adapter)
    wanted, found = outputs(trained.eval()).float(), outputs(base.load(tmp_path / "merged")).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_in_float32_nothing_of_the_change_is_lost(quantized: Quantized, tmp_path: Path) -> None:
    _, base, adapter = quantized
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--dtype", "float32")
    after, delta = tensors(tmp_path / "merged"), changes(adapter)
    before = {name: decoded(base.path, name) for name in delta}
    assert {t.dtype for t in after.values()} == {torch.float32}
    noise = sum((after[n] - before[n] - d).norm() ** 2 for n, d in delta.items())
    # what dequantizing to bfloat16 rounds away of the weight, at most
    assert noise.sqrt() < 0.5 * sum(d.norm() ** 2 for d in delta.values()).sqrt()
    assert retained(before, after, delta) == pytest.approx(1, abs=0.02)


def test_the_original_view_merges_into_the_weights_before_quantization(
    quantized: Quantized, tmp_path: Path
) -> None:
    original, base, adapter = quantized
    view = ("--base-view", "original", "--original", original.path)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *view)
    after = tensors(tmp_path / "merged")
    for name, change in changes(adapter).items():
        rounded_once(after[name], tensors(original.path)[name], change)
    wanted = outputs(merged_by_peft(original, (adapter, 1.0))).float()
    found = outputs(original.load(tmp_path / "merged")).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_a_model_that_has_run_on_this_cpu_merges_as_its_file_says(
    quantized: Quantized, tmp_path: Path
) -> None:
    # on CPUs with AVX512-BF16 a forward repacks the live weights; PEFT's merge then reads them as if
    # they were not, and its result is 144 % off. Files do not run
    _, base, adapter = quantized
    model = AutoModelForCausalLM.from_pretrained(base.path)
    outputs(model)
    stored = {name: t.contiguous() for name, t in model.state_dict().items()}
    run = tmp_path / "run"
    run.mkdir()
    save(stored, run, base)
    done("merge", run, adapter, "-o", tmp_path / "merged")
    after = tensors(tmp_path / "merged")
    for name, change in changes(adapter).items():
        rounded_once(after[name], decoded(run, name), change)
        error = (after[name].double() - decoded(base.path, name) - change).norm()
        assert error < 0.02 * after[name].double().norm()


def save(stored: dict[str, Tensor], directory: Path, like: Base) -> None:
    from safetensors.torch import save_file

    save_file(stored, directory / "model.safetensors", {"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        (directory / file).write_bytes((like.path / file).read_bytes())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--requantize", "from-original"), "--original"),
        (("--base-view", "original"), "--original"),
        (("--requantize", "stochastic"), "--seed"),
        (("--requantize", "residual", "--rank", "0"), "--rank"),
        (("--requantize", "rtn", "--dtype", "float32"), "--dtype"),
        (("--requantize", "best"), "best"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_options_that_do_not_go_together_are_usage_errors(
    quantized: Quantized, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    _, base, adapter = quantized
    result = surgery("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_requantizing_a_base_that_is_not_quantized_is_a_usage_error(
    quantized: Quantized, tmp_path: Path
) -> None:
    original, _, adapter = quantized
    flags = ("-o", tmp_path / "merged", "--requantize", "rtn")
    result = surgery("merge", original.path, adapter, *flags)
    assert result.exit_code == 2
    assert str(original.path) in result.stderr
    assert list(tmp_path.iterdir()) == []
