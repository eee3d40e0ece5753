"""Directories for vLLM and transformers: what bitsandbytes and PEFT make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from decoders import TOKENS, make_decoder, scores
from merging import done, make_adapter, surgery
from peft import PeftModel
from safetensors.numpy import load_file
from tiny import Base
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("directories") / "base")


@pytest.fixture(scope="session")
def base(decoder: Path) -> Base:
    return Base(decoder, AutoModelForCausalLM, torch.float32)


@pytest.fixture(scope="session")
def adapter(base: Base) -> Path:
    modules = ["q_proj", "up_proj"]
    return make_adapter(base, base.path.with_name("small"), target_modules=modules)


@pytest.fixture(scope="session")
def dora(base: Base) -> Path:
    path = base.path.with_name("dora")
    return make_adapter(base, path, target_modules=["q_proj"], use_dora=True)


def adapted(folder: Path, adapter: Path) -> np.ndarray:
    """PEFT's logits in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    return found


def config_of(folder: Path, name: str = "adapter_config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


@pytest.mark.parametrize("to", ["vllm", "transformers"])
def test_an_nf4_base_with_an_adapter_loads_in_bitsandbytes_and_peft(
    decoder: Path, adapter: Path, tmp_path: Path, to: str
) -> None:
    out = tmp_path / "out"
    done("export", decoder, "-o", out, "--to", to, "--weights", "nf4", "-a", adapter)
    done("quantize", decoder, "-o", tmp_path / "nf4")
    ours, theirs = (load_file(f / "model.safetensors") for f in (out, tmp_path / "nf4"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert config_of(out, "config.json")["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert isinstance(model.model.layers[0].self_attn.q_proj, bitsandbytes.nn.Linear4bit)
    found = adapted(out, out / "adapters" / "small")
    np.testing.assert_allclose(found, adapted(tmp_path / "nf4", adapter), atol=1e-4)
    assert np.abs(found - scores(out)).max() > 0.1
    assert (out / "tokenizer.json").is_file()
    assert config_of(out, "surgery.json")["settings"]["to"] == to


def test_ranks_become_one_that_vllm_has_room_for(
    decoder: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = done("export", decoder, "-o", out, "--to", "vllm", "-a", adapter, "-a", adapter)
    said = config_of(out / "adapters" / "small")
    assert (said["r"], said["lora_alpha"], said["use_dora"]) == (8, 8, False)
    assert not said["rank_pattern"]
    assert (out / "adapters" / "small-2").is_dir()
    assert "small: 4 modules are filled up with zeros to rank 8" in result.stderr
    serve = "vllm serve DIR --enable-lora --max-lora-rank 8 --lora-modules small=DIR/adapters/small"
    assert serve in result.stderr
    np.testing.assert_allclose(
        adapted(out, out / "adapters" / "small"), adapted(decoder, adapter), atol=1e-4
    )
    # the base is copied as it is
    assert (out / "model.safetensors").read_bytes() == (decoder / "model.safetensors").read_bytes()


def test_a_dora_is_the_nearest_lora_for_vllm_with_its_error(
    decoder: Path, dora: Path, tmp_path: Path
) -> None:
    refused = surgery("export", decoder, "-o", tmp_path / "out", "--to", "vllm", "-a", dora)
    assert refused.stderr.strip() == (
        f"error: {dora}: has a dora, which vllm does not read and no small LoRA equals. Pass --rank: the "
        "nearest LoRA of that rank is written, with its error."
    )
    assert not list(tmp_path.iterdir())
    errors = []
    for rank in (8, 64):
        out = tmp_path / f"rank-{rank}"
        done("export", decoder, "-o", out, "--to", "vllm", "-a", dora, "--rank", rank)
        errors.append(
            config_of(out, "surgery.json")["tensors"]["adapter dora"]["metrics"]["relative_error"]
        )
    assert errors[0] > 0.01
    # a whole rank loses nothing but a rounding
    assert errors[1] < 1e-5
    found = adapted(decoder, tmp_path / "rank-64" / "adapters" / "dora")
    np.testing.assert_allclose(found, adapted(decoder, dora), atol=1e-3)


def test_a_dora_stays_one_for_peft(decoder: Path, dora: Path, tmp_path: Path) -> None:
    done("export", decoder, "-o", tmp_path / "out", "--to", "transformers", "-a", dora)
    beside = tmp_path / "out" / "adapters" / "dora"
    assert config_of(beside)["use_dora"] is True
    np.testing.assert_allclose(adapted(decoder, beside), adapted(decoder, dora), atol=1e-5)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4"])
def test_merged_adapters_are_in_the_weights(
    decoder: Path, adapter: Path, tmp_path: Path, weights: str
) -> None:
    out = tmp_path / "out"
    flags = "--to", "transformers", "--weights", weights
    done("export", decoder, "-o", out, *flags, "-a", adapter, "--merge-adapters")
    done("merge", decoder, adapter, "-o", tmp_path / "merged", "--dtype", "float32")
    if weights == "nf4":
        done("quantize", tmp_path / "merged", "-o", tmp_path / "same")
    else:
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[weights]
        done("merge", decoder, adapter, "-o", tmp_path / "same", "--dtype", dtype)
    ours = (out / "model.safetensors").read_bytes()
    assert ours == (tmp_path / "same" / "model.safetensors").read_bytes()
    assert not (out / "adapters").exists()


def test_an_nf4_base_is_unpacked_where_16_bits_are_asked_for(decoder: Path, tmp_path: Path) -> None:
    done("quantize", decoder, "-o", tmp_path / "nf4")
    done("export", tmp_path / "nf4", "-o", tmp_path / "out", "--to", "vllm", "--weights", "bf16")
    config = config_of(tmp_path / "out", "config.json")
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


def test_what_cannot_be_is_refused_and_nothing_written(
    decoder: Path, adapter: Path, tmp_path: Path
) -> None:
    done("quantize", decoder, "-o", tmp_path / "nf4")
    nf4, merged = tmp_path / "nf4", ("-a", adapter, "--merge-adapters")
    for base, flags, message in (
        (
            nf4,
            merged,
            f"--merge-adapters: {nf4} is NF4, and rounding to the same grid again would take the adapters "
            "away. Pass --weights bf16, leave them beside it, or `merge` with --requantize.",
        ),
        (
            decoder,
            ("--weights", "int4"),
            "--weights int4: is written as ONNX alone. Pass nf4, bf16, fp16 or fp32.",
        ),
        (
            decoder / "model.safetensors",
            (),
            f"{decoder}/model.safetensors: has no config.json, without which vllm loads nothing. Name a "
            "model directory; `convert-checkpoint` makes one of a GGUF file.",
        ),
    ):
        result = surgery("export", base, "-o", tmp_path / "out", "--to", "vllm", *flags)
        assert result.stderr.strip() == f"error: {message}"
    assert [p.name for p in tmp_path.iterdir()] == ["nf4"]
    onnx = surgery("export", decoder, "-o", tmp_path / "out", "--weights", "bf16")
    assert onnx.stderr.strip() == (
        "error: --weights bf16: is not written as ONNX. Pass fp16, or --to transformers."
    )
