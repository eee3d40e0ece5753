"""convert --for: what a runtime reads, with the same change in it; and what it cannot hold, refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from tests import small


def surgery(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_vllm_gets_one_allowed_rank_alpha_equal_to_it_and_the_same_change(tmp_path):
    # vLLM reads r and alpha alone: patterns and rsLoRA's root must be in B
    adapter = small.adapter(tmp_path / "a", size=5, use_rslora=True, alpha_pattern={"up_proj": 2.5})
    result = surgery("convert", adapter, "--for", "vllm", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    was = load_file(adapter / "adapter_model.safetensors")
    got = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, a in was.items():
        if ".lora_A." not in key:
            continue
        b = was[key.replace("lora_A", "lora_B")]
        scaling = (2.5 if "up_proj" in key else small.ALPHA) / small.RANK**0.5
        made = got[key.replace("lora_A", "lora_B")] @ got[key]
        assert got[key].shape[0] == 8
        torch.testing.assert_close(made, scaling * (b @ a), rtol=1e-5, atol=1e-8)


def test_an_unknown_runtime_is_answered_with_the_known_ones(tmp_path):
    result = surgery("convert", small.adapter(tmp_path / "a"), "--for", "vlm", "-o", tmp_path / "o")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: --for vlm: no such runtime is known. Did you mean 'vllm'?\n",
    )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("flag", [("--rank", "4"), ("--uniform-rank",), ("--dialect", "peft")])
def test_what_a_runtime_decides_itself_is_not_asked_for_as_well(tmp_path, flag):
    adapter = small.adapter(tmp_path / "a")
    result = surgery("convert", adapter, "--for", "vllm", *flag, "-o", tmp_path / "o")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --for: decides on ranks, scale and layout itself. Take the others away.\n",
    )
