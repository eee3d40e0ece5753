"""Tied embeddings: one tensor that two modules use. What PEFT's merge makes of it, and the other ways."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import done, make_adapter, merged_by_peft, same_weights, surgery, unmerged_by_peft
from tiny import Base, outputs, tensors
from transformers import PreTrainedModel

Bases = Callable[..., Base]

EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}
HEAD = {"target_modules": ["lm_head", "q_proj"]}
BOTH = {"target_modules": ["embed_tokens", "lm_head"]}
WHOLE_HEAD = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
WHOLE_EMBEDDING = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
WHOLE_BOTH = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
MIXED = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
WHOLE_TIED = WHOLE_HEAD | {"ensure_weight_tying": True}
GPT2 = {"fan_in_fan_out": True}

NAMES = {
    "llama-tied": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
}

# kind, adapter, whether one tensor is left for both
CASES = {
    "LoRA on the embedding": ("llama-tied", EMBEDDING, True),
    "LoRA on the head": ("llama-tied", HEAD, True),
    "LoRA on both": ("llama-tied", BOTH, True),
    "a whole head": ("llama-tied", WHOLE_HEAD, False),
    "a whole embedding": ("llama-tied", WHOLE_EMBEDDING, False),
    "both whole": ("llama-tied", WHOLE_BOTH, False),
    "both whole, kept equal": ("llama-tied", WHOLE_TIED, True),
    "a whole embedding, LoRA on the head": ("llama-tied", MIXED, False),
    "GPT-2, LoRA on the embedding": ("gpt2", GPT2 | {"target_modules": ["wte", "c_attn"]}, True),
    "GPT-2, LoRA on the head": ("gpt2", GPT2 | {"target_modules": ["lm_head", "c_attn"]}, True),
    "GPT-2, a whole head": (
        "gpt2", GPT2 | {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]}, False,
    ),
}  # fmt: skip


def tied(directory: Path) -> bool:
    """What config.json says; both kinds here are tied where it says nothing."""
    value: bool = json.loads((directory / "config.json").read_text()).get(
        "tie_word_embeddings", True
    )
    return value


def shared(model: PreTrainedModel) -> bool:
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    return bool(embedding.weight.data_ptr() == head.weight.data_ptr())


@pytest.mark.parametrize(("kind", "config", "stay"), CASES.values(), ids=CASES)
def test_by_default_the_merged_model_is_what_peft_makes_of_a_tied_one(
    bases: Bases, tmp_path: Path, kind: str, config: dict[str, Any], stay: bool
) -> None:
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    wanted, found = merged_by_peft(base, (adapter, 1.0)), base.load(tmp_path / "merged")
    assert shared(wanted) == stay
    assert shared(found) == stay
    assert tied(tmp_path / "merged") == stay
    stored, (embedding, head) = tensors(tmp_path / "merged"), NAMES[kind]
    assert embedding in stored
    assert (head in stored) == (not stay)
    same_weights(found, wanted)
    torch.testing.assert_close(outputs(found), outputs(wanted), rtol=1e-5, atol=1e-5)
    # what PEFT itself would write and read again
    wanted.save_pretrained(tmp_path / "theirs")
    again = base.load(tmp_path / "theirs")
    torch.testing.assert_close(outputs(found), outputs(again), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["LoRA on the embedding", "LoRA on the head", "LoRA on both"])
def test_untied_the_merged_model_is_the_trained_one(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    # while it is trained, an adapter on one of the two leaves the other as it is
    kind, config, _ = CASES[name]
    base = bases(kind)
    adapter = make_adapter(base, tmp_path / "adapter", **config)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--tied", "untie")
    found, trained = base.load(tmp_path / "merged"), unmerged_by_peft(base, adapter)
    assert not shared(found)
    assert not tied(tmp_path / "merged")
    torch.testing.assert_close(outputs(found), outputs(trained), rtol=1e-5, atol=1e-5)
    by_default = merged_by_peft(base, (adapter, 1.0))
    assert (outputs(trained) - outputs(by_default)).abs().max() > 0.1


def test_untied_by_two_equal_adapters_the_merged_model_is_the_trained_one(
    bases: Bases, tmp_path: Path
) -> None:
    # ensure_weight_tying saves one change under two names; PEFT's own merge adds it twice
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", **BOTH, ensure_weight_tying=True)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--tied", "untie")
    found, trained = base.load(tmp_path / "merged"), unmerged_by_peft(base, adapter)
    torch.testing.assert_close(outputs(found), outputs(trained), rtol=1e-5, atol=1e-5)


def test_two_equal_adapters_of_a_tied_pair_are_merged_once_into_the_shared_tensor(
    bases: Bases, tmp_path: Path
) -> None:
    # the one place where the default is not PEFT's: its merge adds the change twice
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", **BOTH, ensure_weight_tying=True)
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    name = "model.embed_tokens.weight"
    w = tensors(base.path)[name]
    once = tensors(tmp_path / "merged")[name] - w
    twice = merged_by_peft(base, (adapter, 1.0)).get_input_embeddings().weight - w
    assert once.norm() > 0.1
    torch.testing.assert_close(2 * once, twice.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["LoRA on the embedding", "LoRA on the head", "a whole head", "a whole embedding"]
)
def test_refused_nothing_is_written_and_the_error_names_both_modules_and_the_flag(
    bases: Bases, tmp_path: Path, name: str
) -> None:
    kind, config, _ = CASES[name]
    adapter = make_adapter(bases(kind), tmp_path / "adapter", **config)
    result = surgery(
        "merge", bases(kind).path, adapter, "-o", tmp_path / "merged", "--tied", "refuse"
    )
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in ("embed_tokens", "lm_head", "--tied"):
        assert word in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_refusing_says_nothing_where_the_adapter_leaves_the_tied_tensor_alone(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--tied", "refuse")
    same_weights(base.load(tmp_path / "merged"), merged_by_peft(base, (adapter, 1.0)))


def test_a_change_of_a_tied_tensor_is_said_aloud(bases: Bases, tmp_path: Path) -> None:
    # the merged model is not the trained one here, whoever merges
    base = bases("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", **EMBEDDING)
    result = done("merge", base.path, adapter, "-o", tmp_path / "merged")
    assert "--tied untie" in result.stderr
