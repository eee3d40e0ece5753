"""Adapters that real PEFT started by changing the base: as LoRA of the base that it was, from files alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from merging import ALPHA, RANK, done, surgery
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from safetensors.torch import load_file
from tiny import Base, outputs
from torch import Tensor
from transformers import PreTrainedModel

TARGETS = ["q_proj", "down_proj"]
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def eigens(w: Tensor) -> SimpleNamespace:
    """What preprocess_corda leaves at a layer (it needs the package attrs): U S Vᵀ = W C, V C⁻¹ for V."""
    x = torch.randn(4 * w.shape[1], w.shape[1], generator=torch.Generator().manual_seed(5))
    c = x.T @ x / len(x)
    u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
    r = RANK
    return SimpleNamespace(U_WC=u[:, :r], S_WC=s[:r], V_WC=(v @ torch.linalg.inv(c))[:r].T)


def train(base: Base, folder: Path, **fields: Any) -> Tensor:
    """start/, trained/ and residual/ as PEFT leaves them, and what the trained model computes."""
    said = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **fields}
    config, model = LoraConfig(**said), base.load()
    if said["init_lora_weights"] == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        for name, module in model.named_modules():
            if name.endswith(tuple(TARGETS)):
                module.eigens = eigens(module.weight.data)
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(folder / "start")
    adapted.peft_config["default"].init_lora_weights = said["init_lora_weights"]
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)
    computed = outputs(adapted.eval())
    adapted.save_pretrained(folder / "trained")
    if not (said.get("use_rslora") and said.get("rank_pattern")):  # for which PEFT raises
        where = str(folder / "start")
        adapted.save_pretrained(folder / "peft", path_initial_model_for_weight_conversion=where)
    unloaded: PreTrainedModel = adapted.unload()
    unloaded.save_pretrained(folder / "residual")
    return computed


def deltas(model: PeftModel) -> dict[str, Tensor]:
    return {
        name: module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


CASES: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iterations": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda"},
    "ranks by pattern": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 5}},
    "patterns and rsLoRA": {
        "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 5}, "use_rslora": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_taken_out_as_peft_does_it_in_memory(
    bases: Callable[..., Base], tmp_path: Path, case: str
) -> None:
    base = bases("llama")
    wanted = train(base, tmp_path, **CASES[case])
    done("convert", tmp_path / "trained", "--init", tmp_path / "start", "-o", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    loaded = PeftModel.from_pretrained(base.load(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(loaded), wanted, **CLOSE)
    done("merge", base.path, tmp_path / "ours", "-o", tmp_path / "merged")
    torch.testing.assert_close(outputs(base.load(tmp_path / "merged")), wanted, **CLOSE)
    assert (outputs(base.load()) - wanted).abs().max() > 0.01
    if (tmp_path / "peft").exists():
        theirs = deltas(PeftModel.from_pretrained(base.load(), tmp_path / "peft"))
        for name, delta in deltas(loaded).items():
            torch.testing.assert_close(delta, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", ["pissa", "olora", "corda"])
def test_what_training_saw_tells_the_start_as_well(
    bases: Callable[..., Base], tmp_path: Path, case: str
) -> None:
    base = bases("llama")
    wanted = train(base, tmp_path, **CASES[case])
    given = ("convert", tmp_path / "trained", "--residual", tmp_path / "residual")
    done(*given, "-o", tmp_path / "plain")
    done("merge", tmp_path / "residual", tmp_path / "plain", "-o", tmp_path / "one")
    torch.testing.assert_close(outputs(base.load(tmp_path / "one")), wanted, **CLOSE)
    done(*given, "--base", base.path, "--exact", "-o", tmp_path / "ours")
    loaded = PeftModel.from_pretrained(base.load(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(loaded), wanted, **CLOSE)


@pytest.mark.parametrize("case", ["pissa", "olora"])
def test_the_base_alone_tells_a_start_that_is_made_of_it(
    bases: Callable[..., Base], tmp_path: Path, case: str
) -> None:
    base = bases("llama")
    wanted = train(base, tmp_path, **CASES[case])
    result = done(
        "convert", tmp_path / "trained", "--base", base.path, "-o", tmp_path / "ours", "--json"
    )
    found = json.loads(result.stdout)
    assert found["total"]["exact_modules"] == found["total"]["modules"]
    assert {m["rank"] for m in found["tensors"].values()} == {2 * RANK}
    loaded = PeftModel.from_pretrained(base.load(), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(loaded), wanted, **CLOSE)


def quantized_residual(base: Base, folder: Path) -> Tensor:
    """As LoftQ leaves it: a residual that NF4 holds, B A beside it; what both compute."""
    done("quantize", base.path, "-o", folder / "nf4")
    done("dequantize", folder / "nf4", "-o", folder / "residual", "--dtype", "float32")
    model = base.load(folder / "residual")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    weights = load_file(base.path / "model.safetensors")
    held = load_file(folder / "residual" / "model.safetensors")
    torch.manual_seed(2)
    for name, module in adapted.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        key = f"{name.removeprefix('base_model.model.')}.weight"
        u, s, v = torch.linalg.svd(weights[key] - held[key], full_matrices=False)
        module.lora_B["default"].weight.data = u[:, :4] * s[:4] ** 0.5
        a = s[:4, None] ** 0.5 * v[:4]
        module.lora_A["default"].weight.data = a + 0.1 * torch.randn_like(a)
    computed = outputs(adapted.eval())
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(folder / "trained")
    path = folder / "trained" / "adapter_config.json"
    said = json.loads(path.read_text()) | {
        "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4},
        "base_model_name_or_path": "made/by-hand",
    }  # fmt: skip
    path.write_text(json.dumps(said))
    return computed


def test_a_loftq_belongs_to_its_quantized_residual_and_says_so(
    bases: Callable[..., Base], tmp_path: Path
) -> None:
    base = bases("llama-nf4-sizes")
    wanted = quantized_residual(base, tmp_path)
    trained, residual = tmp_path / "trained", tmp_path / "residual"
    result = surgery("merge", base.path, trained, "-o", tmp_path / "x")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {trained / 'adapter_config.json'}: init_lora_weights is 'loftq': its factors belong to "
        "what was left of made/by-hand at the start of training. Convert it with --residual MODEL "
        "first.\n"
    )
    assert surgery("lint", trained, "--for", "vllm").stderr == result.stderr
    shown = " ".join(done("inspect", trained).stdout.split())
    assert "start loftq: its factors belong to what was left of the base" in shown
    done("convert", trained, "--residual", residual, "-o", tmp_path / "plain")
    done("merge", residual, tmp_path / "plain", "-o", tmp_path / "merged")
    torch.testing.assert_close(outputs(base.load(tmp_path / "merged")), wanted, **CLOSE)
    errors = []
    for rank in (8, 64):
        given = ("--residual", residual, "--base", base.path, "--rank", rank, "--exact")
        found = json.loads(
            done("convert", trained, *given, "-o", tmp_path / f"o{rank}", "--json").stdout
        )
        errors.append(found["total"]["relative_error"])
        off = whole = 0.0
        done("merge", base.path, tmp_path / f"o{rank}", "-o", tmp_path / f"m{rank}")
        old, right, got = (
            load_file(tmp_path / f / "model.safetensors")
            for f in (base.path, tmp_path / "merged", f"m{rank}")
        )
        for name in found["tensors"]:
            off += float((got[name].double() - right[name].double()).square().sum())
            whole += float((right[name].double() - old[name].double()).square().sum())
        assert (off / whole) ** 0.5 == pytest.approx(errors[-1], rel=1e-3, abs=1e-5)
    assert errors[1] < errors[0]


def test_errors(bases: Callable[..., Base], tmp_path: Path) -> None:
    base = bases("llama")
    train(base, tmp_path, init_lora_weights="pissa")
    (tmp_path / "other").mkdir()
    train(base, tmp_path / "other", init_lora_weights="pissa", r=4)
    trained, start, out = tmp_path / "trained", tmp_path / "start", ("-o", tmp_path / "x")

    def said(*arguments: object) -> str:
        result = surgery("convert", *arguments, *out)
        assert result.exit_code in (1, 2)
        return str(result.stderr).removeprefix("error: ").rstrip("\n")

    assert said(start, "--init", start) == (
        f"--init: {start} began as True, which takes nothing out of its base. Take it away."
    )
    other = tmp_path / "other" / "start"
    first = next(iter(load_file(trained / "adapter_model.safetensors")))
    module = first.removeprefix("base_model.model.").partition(".lora_")[0]
    assert said(trained, "--init", other).startswith(f"{other}: {module}.weight has A [4, ")
    assert said(trained, "--init", other).endswith("Name the start of this very training.")
    assert said(trained, "--init", base.path) == (
        f"--init: {base.path} has no adapter_config.json. Name a directory that PEFT wrote."
    )
    assert said(trained, "--init", start, "--residual", base.path) == (
        "--init: says the same as --residual. Pass one of the two."
    )
    path = trained / "adapter_config.json"
    config = json.loads(path.read_text())
    for fields, message in (
        ({"use_dora": True}, "use_dora is true: its norms are of a base that is gone. Merge it with PEFT "
         "itself."),
        ({"init_lora_weights": "loftq"}, "LoftQ's base is what its quantization left, which the factors "
         "of its start do not tell. Pass --residual DIR, the model that it was trained on."),
        ({"init_lora_weights": "olora", "fan_in_fan_out": True}, "PEFT takes OLoRA's start out of a "
         "turned weight the wrong way round. Pass --residual DIR, the model that it was trained on."),
    ):  # fmt: skip
        path.write_text(json.dumps(config | fields))
        assert said(trained, "--init", start) == f"{trained}: {message}"
    path.write_text(json.dumps(config | {"peft_type": "VERA"}))
    assert said(trained, "--init", start) == (
        f"--init: {trained} is VERA, which has no such start. Take it away."
    )
