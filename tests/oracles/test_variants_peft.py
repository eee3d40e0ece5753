"""Every variant that PEFT has too: merged, written, undone and verified, held against PEFT's own layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import ALPHA, RANK, done, merged_by_peft, same_weights, surgery
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import TOKENS, Base, outputs, tensors

from lorasurgery.dialects import peft
from lorasurgery.model import open_model
from lorasurgery.targets import completed

Bases = Callable[..., Base]
# float32 on both sides, summed in another order; an error of a weight grows tenfold in a logit
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# what is trained, by a part of its name
TRAINED = ("lora_", "vera_lambda")


@dataclass(frozen=True)
class Case:
    """An adapter that PEFT makes, and a tensor that it changes."""

    name: str
    kind: str
    config: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)


def dora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "use_dora": True} | settings)


def adalora(**settings: Any) -> AdaLoraConfig:
    schedule = {"total_step": 20, "tinit": 1, "tfinal": 5, "deltaT": 1, "target_r": 2}
    return AdaLoraConfig(**{"init_r": 6, "lora_alpha": ALPHA} | schedule | settings)


def vera(**settings: Any) -> VeraConfig:
    return VeraConfig(**{"r": 7, "projection_prng_key": 11} | settings)


CASES = [
    Case("DoRA", "llama", dora, {"target_modules": "all-linear"}),
    Case("DoRA with patterns and rsLoRA", "llama", dora,
         {"target_modules": ["q_proj", "down_proj"], "use_rslora": True,
          "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 2.5}}),
    Case("DoRA of embeddings and a head", "llama", dora,
         {"target_modules": ["embed_tokens", "lm_head", "up_proj"]}),
    Case("DoRA of tied embeddings", "llama-tied", dora, {"target_modules": ["embed_tokens"]}),
    Case("DoRA beside biases", "llama-biased", dora,
         {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    Case("DoRA of Conv1D, square and not", "gpt2", dora,
         {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Case("DoRA of an encoder", "bert", dora, {"target_modules": "all-linear"}),
    Case("DoRA of T5", "t5", dora, {"target_modules": ["q", "v", "wi", "wo"]}),
    Case("DoRA of a convolution", "llava", dora, {"target_modules": ["patch_embedding", "q_proj"]}),
    Case("AdaLoRA", "llama", adalora, {"target_modules": "all-linear"}),
    Case("AdaLoRA beside biases", "llama-biased", adalora,
         {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    Case("AdaLoRA and a whole head", "llama", adalora,
         {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    Case("AdaLoRA of Conv1D", "gpt2", adalora,
         {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    Case("AdaLoRA of an encoder", "bert", adalora, {"target_modules": ["query", "dense"]}),
    Case("AdaLoRA of T5", "t5", adalora, {"target_modules": ["q", "v", "wi", "wo"]}),
    Case("VeRA", "llama", vera, {"target_modules": "all-linear"}),
    Case("VeRA of one width", "llama", vera, {"target_modules": ["q_proj"]}),
    Case("VeRA without its projections", "llama", vera,
         {"target_modules": "all-linear", "save_projection": False}),
    Case("VeRA of Conv1D", "gpt2", vera,
         {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "save_projection": False}),
    Case("VeRA of an encoder", "bert", vera, {"target_modules": "all-linear"}),
    Case("VeRA of T5", "t5", vera, {"target_modules": ["q", "v", "wi", "wo"]}),
]  # fmt: skip
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}, {case.name}")


def make(base: Base, case: Case, path: Path) -> Path:
    """Let PEFT make it, move all that is trained, and save it."""
    torch.manual_seed(1)
    adapted = get_peft_model(base.load(), case.config(**case.settings))
    for name, p in adapted.named_parameters():
        if "magnitude" in name:
            p.data *= 1 + 0.3 * torch.randn_like(p)
        elif any(part in name for part in TRAINED):
            p.data += 0.2 * torch.randn_like(p)
        elif p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    adapted.save_pretrained(path)
    return path


def written(base: Base, adapter: Path, path: Path) -> Path:
    """Read and written again, by us."""
    path.mkdir()
    peft.write(completed(open_model(base.path), peft.read(adapter)), path)
    return path


@EACH
def test_the_merged_directory_is_the_model_that_peft_merges(
    bases: Bases, tmp_path: Path, case: Case
) -> None:
    base = bases(case.kind)
    adapter = make(base, case, tmp_path / "adapter")
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    # without set_scale, which knows nothing of AdaLoRA's 1e-5
    wanted: Any = PeftModel.from_pretrained(base.load(), adapter).merge_and_unload().eval()
    found = base.load(tmp_path / "merged")
    before = dict(base.load().named_parameters())
    moved = max(float((p - before[n]).detach().norm()) for n, p in wanted.named_parameters())
    assert moved > 0.1  # or else there would be nothing to see
    same_weights(found, wanted)
    torch.testing.assert_close(outputs(found), outputs(wanted), **CLOSE)


@EACH
def test_what_is_written_is_what_peft_loads(bases: Bases, tmp_path: Path, case: Case) -> None:
    base = bases(case.kind)
    adapter = make(base, case, tmp_path / "adapter")
    ours = written(base, adapter, tmp_path / "ours")
    before, after = tensors(adapter), tensors(ours)
    assert before.keys() == after.keys()
    model = PeftModel.from_pretrained(base.load(), ours).eval()
    wanted = PeftModel.from_pretrained(base.load(), adapter).eval()
    torch.testing.assert_close(outputs(model), outputs(wanted), rtol=0, atol=1e-6)


@EACH
def test_the_base_comes_back_byte_for_byte_and_verify_tells(
    bases: Bases, tmp_path: Path, case: Case
) -> None:
    base = bases(case.kind, torch.bfloat16)
    adapter = make(base, case, tmp_path / "adapter")
    merged, undo = tmp_path / "merged", tmp_path / "undo"
    done("merge", base.path, adapter, "-o", merged, "--undo", undo)
    done("verify", merged, "--base", base.path, "--adapter", adapter)
    done("unmerge", merged, adapter, "-o", tmp_path / "back", "--undo", undo)
    for file in base.path.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    file = merged / "model.safetensors"
    held = tensors(merged)
    name = next(
        n for n, t in held.items() if t.ndim == 2 and not torch.equal(t, tensors(base.path)[n])
    )
    held[name][0] *= 1.5
    save_file(held, file, {"format": "pt"})
    result = surgery("verify", merged, "--base", base.path, "--adapter", adapter)
    assert result.exit_code == 3
    assert name in result.stdout + result.stderr


@pytest.mark.parametrize("kind", ["llama-nf4-sizes", "gpt2"])
def test_in_an_nf4_base_the_norm_is_of_the_dequantized_weight(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base = bases(kind)
    done("quantize", base.path, "-o", tmp_path / "nf4")
    done("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain")
    plain = Base(tmp_path / "plain", base.auto, base.dtype)
    adapter = make(plain, Case("", kind, dora, {"target_modules": "all-linear"}), tmp_path / "a")
    done("merge", tmp_path / "nf4", adapter, "-o", tmp_path / "merged", "--dtype", "float32")
    same_weights(base.load(tmp_path / "merged"), merged_by_peft(plain, (adapter, 1.0)))


@pytest.mark.parametrize("policy", ["rtn", "keep-absmax", "residual"])
def test_a_requantized_base_comes_back_byte_for_byte(
    bases: Bases, tmp_path: Path, policy: str
) -> None:
    base = bases("llama-nf4-sizes")
    done("quantize", base.path, "-o", tmp_path / "nf4")
    settings = {"target_modules": ["q_proj", "down_proj"]}
    adapter = make(base, Case("", "", dora, settings), tmp_path / "a")
    merged, undo = tmp_path / "merged", tmp_path / "undo"
    flags = ("--undo", undo, "--requantize", policy)
    done("merge", tmp_path / "nf4", adapter, "-o", merged, *flags)
    done("verify", merged, "--base", tmp_path / "nf4", "--adapter", adapter)
    done("unmerge", merged, adapter, "-o", tmp_path / "back", "--undo", undo)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "nf4" / name).read_bytes()


def test_a_pruned_adalora_is_read_as_peft_resizes_it(bases: Bases, tmp_path: Path) -> None:
    # trained until whole modules are pruned to rank 0, and then by us written once more
    base = bases("llama")
    torch.manual_seed(1)
    config = adalora(target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(base.load(), config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for step in range(20):
        adapted(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        adapted.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    wanted = outputs(adapted.eval())
    adapted.save_pretrained(tmp_path / "adapter")
    kept = {n: len(t) for n, t in tensors(tmp_path / "adapter").items() if "lora_E" in n}
    assert min(kept.values()) == 0 < max(kept.values()) < 6
    ours = written(base, tmp_path / "adapter", tmp_path / "ours")
    for i, adapter in enumerate((tmp_path / "adapter", ours)):
        out = tmp_path / f"merged{i}"
        done("merge", base.path, adapter, "-o", out)
        done("verify", out, "--base", base.path, "--adapter", adapter)
        torch.testing.assert_close(outputs(base.load(out)), wanted, **CLOSE)
    loaded = PeftModel.from_pretrained(base.load(), ours).eval()
    torch.testing.assert_close(outputs(loaded), wanted, **CLOSE)
    assert (outputs(base.load()) - wanted).abs().max() > 0.01


def test_projections_are_drawn_as_peft_draws_them_and_checked_by_their_hash(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama")
    for keep in (True, False):
        case = Case("", "", vera, {"target_modules": "all-linear", "save_projection": keep})
        make(base, case, tmp_path / f"{keep}")
    a = tensors(tmp_path / "True")["base_model.vera_A"]
    ours = written(base, tmp_path / "False", tmp_path / "ours")
    site = completed(open_model(base.path), peft.read(tmp_path / "False")).sites[0]
    loaded = site.load()["A"]
    assert loaded.tobytes() == a[:, : loaded.shape[1]].numpy().tobytes()
    # of another base, other projections are drawn
    with (ours / "adapter_model.safetensors").open("rb") as file:
        assert hashlib.sha256(a.numpy().tobytes()).hexdigest().encode() in file.read(4096)
    config = json.loads((ours / "adapter_config.json").read_text())
    (ours / "adapter_config.json").write_text(json.dumps(config | {"projection_prng_key": 12}))
    result = surgery("merge", base.path, ours, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert f"error: {ours}: vera_A has sha256 " in result.stderr
    assert not (tmp_path / "merged").exists()
