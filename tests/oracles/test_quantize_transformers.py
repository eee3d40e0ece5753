"""quantize against transformers and bitsandbytes: the same modules, the same bytes, the same tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import done
from tiny import TOKENS, Base, tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

Bases = Callable[..., Base]
STATE = ".quant_state.bitsandbytes__nf4"


def by_transformers(base: Base, out: Path, *, double: bool = True, **more: Any) -> Path:
    """Quantized while loading and saved before any forward, which may repack the weights."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=base.dtype, **more,
    )  # fmt: skip
    model = base.auto.from_pretrained(base.path, dtype=base.dtype, quantization_config=config)
    model.save_pretrained(out)
    return out


def comparable(directory: Path) -> dict[str, Any]:
    """All tensors; quantization states as what their JSON says."""
    found: dict[str, Any] = {}
    for name, tensor in tensors(directory).items():
        found[name] = json.loads(bytes(tensor.tolist())) if name.endswith(STATE) else tensor
    return found


def assert_same(ours: Path, theirs: Path) -> None:
    """Name for name and byte for byte."""
    found, wanted = comparable(ours), comparable(theirs)
    assert {n for n in found if n.endswith(STATE)} == {n for n in wanted if n.endswith(STATE)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            assert found[name].dtype == value.dtype, name
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bytes_are_those_that_transformers_writes(
    bases: Bases, tmp_path: Path, dtype: torch.dtype, double: bool
) -> None:
    base = bases("llama-nf4-sizes", dtype)
    theirs = by_transformers(base, tmp_path / "theirs", double=double)
    flag = "--double-quant" if double else "--no-double-quant"
    done("quantize", base.path, "-o", tmp_path / "ours", flag)
    assert_same(tmp_path / "ours", theirs)


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "llama-biased", "llama-tied", "llama-sharded", "llama-classifier", "gpt2", "bert", "bert-classifier",
        "mixtral", "qwen3-moe", "gpt-oss", "llava",
    ],
)  # fmt: skip
def test_the_modules_are_those_that_transformers_quantizes(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base = bases(kind, torch.bfloat16)
    theirs = by_transformers(base, tmp_path / "theirs")
    done("quantize", base.path, "-o", tmp_path / "ours")
    assert_same(tmp_path / "ours", theirs)
    base.load(tmp_path / "ours")


def greedy(path: Path, dtype: torch.dtype, prompt: Tensor = TOKENS) -> list[list[int]]:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    assert model.config.quantization_config.load_in_4bit
    with torch.inference_mode():
        made = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
    found: list[list[int]] = made.tolist()
    return found


@pytest.mark.parametrize("double", [True, False])
def test_the_greedy_tokens_are_those_of_transformers_own_quantization(
    bases: Bases, tmp_path: Path, double: bool
) -> None:
    base = bases("llama-nf4-sizes", torch.bfloat16)
    theirs = by_transformers(base, tmp_path / "theirs", double=double)
    flag = "--double-quant" if double else "--no-double-quant"
    done("quantize", base.path, "-o", tmp_path / "ours", flag)
    tokens = greedy(tmp_path / "ours", base.dtype)
    assert tokens == greedy(theirs, base.dtype)
    assert tokens[0][len(TOKENS[0]) :] != tokens[1][len(TOKENS[1]) :]


def test_conv1d_comes_back_as_it_was_turned(bases: Bases, tmp_path: Path) -> None:
    base = bases("gpt2", torch.float32)
    done("quantize", base.path, "-o", tmp_path / "nf4")
    done("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain")
    before, after = tensors(base.path), tensors(tmp_path / "plain")
    assert before.keys() == after.keys()
    for name, w in before.items():
        assert after[name].shape == w.shape, name
        # NF4 on normal weights: about 10 % of the norm; a turned matrix would be off by 140 %
        assert (after[name] - w).norm() <= 0.12 * w.norm(), name
    base.load(tmp_path / "plain")


def test_smollm2_quantizes_and_speaks_as_by_transformers(smollm2: Path, tmp_path: Path) -> None:
    done("convert-checkpoint", smollm2, "-o", tmp_path / "base", "--max-shard-size", "100MB")
    base = Base(tmp_path / "base", AutoModelForCausalLM, torch.bfloat16)
    theirs = by_transformers(base, tmp_path / "theirs")
    done("quantize", base.path, "-o", tmp_path / "ours")
    assert_same(tmp_path / "ours", theirs)
    prompt = AutoTokenizer.from_pretrained(tmp_path / "ours")("The capital of France is").input_ids
    tokens = torch.tensor([prompt])
    assert greedy(tmp_path / "ours", base.dtype, tokens) == greedy(theirs, base.dtype, tokens)
