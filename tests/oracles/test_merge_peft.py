"""The merged directory is the model that PEFT's merge_and_unload makes, for every option of its LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merge_cases import CASES, STACK, Case
from merging import ALPHA, RANK, done, make_adapter, merged_by_peft, same_weights
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny import TOKENS, Base, outputs, tensors
from transformers import AutoModelForSequenceClassification

Bases = Callable[..., Base]

# float32 on both sides; they differ in the order of sums over a rank of at most 24, and once more
# in each of the model's own layers, so that an error of 1e-7 in a weight grows tenfold in a logit
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}, {case.name}")
def test_the_merged_directory_is_the_model_that_peft_merges(
    bases: Bases, tmp_path: Path, case: Case
) -> None:
    base = bases(case.kind)
    adapter = make_adapter(base, tmp_path / "adapter", **case.config)
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    wanted, found = merged_by_peft(base, (adapter, 1.0)), base.load(tmp_path / "merged")
    before, after = (dict(m.named_parameters()) for m in (base.load(), wanted))
    for name in case.changes:  # or else there would be nothing to see
        assert (after[name] - before[name]).norm() > 0.1, name
    for name in case.keeps:
        assert torch.equal(after[name], before[name]), name
    same_weights(found, wanted)
    torch.testing.assert_close(outputs(found), outputs(wanted), **CLOSE)


def test_the_merged_directory_keeps_names_dtypes_and_what_no_adapter_touches(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("mixtral")
    adapter = make_adapter(base, tmp_path / "adapter", **STACK)
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    before, after = tensors(base.path), tensors(tmp_path / "merged")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    touched = {name for name in before if ".experts." in name}
    assert {n for n in before if not torch.equal(before[n], after[n])} == touched


def test_an_adapter_saved_as_bin_merges_like_one_in_safetensors(
    bases: Bases, tmp_path: Path
) -> None:
    base, config = bases("llama"), {"target_modules": ["q_proj", "lm_head"]}
    pickled = make_adapter(base, tmp_path / "pickled", binary=True, **config)
    plain = make_adapter(base, tmp_path / "plain", **config)
    assert [p.name for p in pickled.glob("adapter_model.*")] == ["adapter_model.bin"]
    done("merge", base.path, pickled, "-o", tmp_path / "a")
    done("merge", base.path, plain, "-o", tmp_path / "b")
    wanted = tensors(tmp_path / "b")
    for name, t in tensors(tmp_path / "a").items():
        assert torch.equal(t, wanted[name]), name
    same_weights(base.load(tmp_path / "a"), merged_by_peft(base, (pickled, 1.0)))


def test_an_adapter_of_the_encoder_merges_into_the_classifier_around_it(
    bases: Bases, tmp_path: Path
) -> None:
    # trained on BertModel: its modules lack the `bert.` that the classifier's checkpoint has
    classifier, encoder = bases("bert-classifier"), bases("bert")
    adapter = make_adapter(encoder, tmp_path / "adapter", target_modules="all-linear")
    done("merge", classifier.path, adapter, "-o", tmp_path / "merged")
    inside = Base(classifier.path, encoder.auto, torch.float32, partly=True)
    found = dict(classifier.load(tmp_path / "merged").named_parameters())
    for name, w in merged_by_peft(inside, (adapter, 1.0)).named_parameters():
        torch.testing.assert_close(found[f"bert.{name}"], w, rtol=1e-6, atol=1e-6, msg=name)


def test_an_adapter_of_the_classifier_merges_into_the_bare_encoder_but_for_its_head(
    bases: Bases, tmp_path: Path
) -> None:
    classifier, encoder = bases("bert-classifier"), bases("bert")
    adapter = make_adapter(
        encoder, tmp_path / "adapter", target_modules=["query"],
        auto=AutoModelForSequenceClassification,
    )  # fmt: skip
    done("merge", encoder.path, adapter, "-o", tmp_path / "merged")
    around = Base(encoder.path, classifier.auto, torch.float32)
    wanted = dict(merged_by_peft(around, (adapter, 1.0)).named_parameters())
    for name, w in encoder.load(tmp_path / "merged").named_parameters():
        torch.testing.assert_close(w, wanted[f"bert.{name}"], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)], ids=["plain", "weighted"])
def test_two_adapters_at_once_are_peft_merging_one_after_the_other(
    bases: Bases, tmp_path: Path, weights: tuple[float, float]
) -> None:
    base = bases("llama-biased")
    first = make_adapter(
        base, tmp_path / "first", target_modules=["q_proj", "v_proj"], lora_bias=True
    )
    second = make_adapter(
        base, tmp_path / "second", seed=2, r=4, lora_alpha=9, use_rslora=True,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
    )  # fmt: skip
    named = [f"{p}:{w}" if w != 1 else p for p, w in zip((first, second), weights, strict=True)]
    done("merge", base.path, *named, "-o", tmp_path / "merged")
    wanted = merged_by_peft(base, (first, weights[0]), (second, weights[1]))
    found = base.load(tmp_path / "merged")
    same_weights(found, wanted)
    torch.testing.assert_close(outputs(found), outputs(wanted), **CLOSE)


def test_two_adapters_of_one_embedding_add_up_though_each_brings_a_copy_of_the_base(
    bases: Bases, tmp_path: Path
) -> None:
    base, targets = bases("llama"), ["embed_tokens", "lm_head"]
    first = make_adapter(base, tmp_path / "first", target_modules=targets)
    second = make_adapter(base, tmp_path / "second", seed=2, r=4, target_modules=targets)
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    assert torch.equal(tensors(first)[copy], tensors(second)[copy])
    done("merge", base.path, f"{first}:0.5", second, "-o", tmp_path / "merged")
    same_weights(base.load(tmp_path / "merged"), merged_by_peft(base, (first, 0.5), (second, 1.0)))


def test_two_adapters_of_fused_experts_add_up(bases: Bases, tmp_path: Path) -> None:
    base = bases("mixtral")
    first = make_adapter(base, tmp_path / "first", **STACK)
    second = make_adapter(base, tmp_path / "second", seed=2, r=2, **STACK)
    done("merge", base.path, f"{first}:0.5", second, "-o", tmp_path / "merged")
    same_weights(base.load(tmp_path / "merged"), merged_by_peft(base, (first, 0.5), (second, 1.0)))


def test_an_adapter_of_single_experts_as_transformers_4_named_them_is_merged(
    bases: Bases, tmp_path: Path
) -> None:
    # PEFT rewrites it for the fused model of transformers 5, where rank and alpha double
    base, adapter = bases("mixtral"), tmp_path / "adapter"
    LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "w1", "w2", "w3", "gate"]
    ).save_pretrained(adapter)
    torch.manual_seed(3)
    stored = {}
    for name, w in tensors(base.path).items():
        module = name.removesuffix(".weight")
        if module.endswith((".w1", ".w2", ".w3", ".gate", ".q_proj")):
            key = f"base_model.model.{module}"
            stored[f"{key}.lora_A.weight"] = 0.2 * torch.randn(RANK, w.shape[1])
            stored[f"{key}.lora_B.weight"] = 0.2 * torch.randn(w.shape[0], RANK)
    save_file(stored, adapter / "adapter_model.safetensors", {"format": "pt"})
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    wanted, found = merged_by_peft(base, (adapter, 1.0)), base.load(tmp_path / "merged")
    assert not torch.allclose(outputs(wanted), outputs(base.load()), atol=0.01)
    same_weights(found, wanted)


def test_an_adapter_whose_start_was_subtracted_when_it_was_saved_merges(
    bases: Bases, tmp_path: Path
) -> None:
    # PiSSA changes the base in memory; path_initial_model_for_weight_conversion makes a plain LoRA of it
    base = bases("llama")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj"], init_lora_weights="pissa"
    )
    adapted = get_peft_model(base.load(), config)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path / "start")
    adapted.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data += 0.1 * torch.randn_like(p)
    with torch.inference_mode():
        wanted = adapted.eval()(TOKENS).logits
    adapted.save_pretrained(
        tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 2 * RANK
    done("merge", base.path, tmp_path / "adapter", "-o", tmp_path / "merged")
    torch.testing.assert_close(outputs(base.load(tmp_path / "merged")), wanted, **CLOSE)
