"""Adapters that algebra has made, loaded by PEFT; PEFT's own weighted sums, the right ones and the wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import done, make_adapter, merged_by_peft, same_weights, unmerged_by_peft
from peft import PeftModel
from tiny import Base, outputs, tensors
from torch import Tensor

TARGETS = ["q_proj", "up_proj", "down_proj"]


def delta_of(module: Any, name: str) -> Tensor:
    """What PEFT says that one adapter adds."""
    found: Tensor = module.get_delta_weight(name).detach()
    return found


def layers(model: PeftModel) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}


@pytest.fixture
def pair(bases, tmp_path: Path) -> tuple[Base, Path, Path]:
    base = bases("llama")
    one = make_adapter(base, tmp_path / "one", target_modules=TARGETS)
    return base, one, make_adapter(base, tmp_path / "two", seed=2, target_modules=TARGETS)


def both(base: Base, one: Path, two: Path) -> PeftModel:
    model = PeftModel.from_pretrained(base.load(), one, adapter_name="a")
    model.load_adapter(two, adapter_name="b")
    return model


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_a_weighted_sum_is_pefts_where_peft_adds_changes(pair, tmp_path: Path, kind: str) -> None:
    base, one, two = pair
    model = both(base, one, two)
    model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "c", combination_type=kind, svd_rank=6)
    done("combine", f"{one}:0.7", f"{two}:0.4", "-o", tmp_path / "out")
    model.load_adapter(tmp_path / "out", adapter_name="ours")
    for name, layer in layers(model).items():
        torch.testing.assert_close(
            delta_of(layer, "ours"), delta_of(layer, "c"), atol=1e-5, rtol=1e-4, msg=name
        )


def test_a_weighted_sum_is_right_where_pefts_linear_averages_factors(pair, tmp_path: Path) -> None:
    base, one, two = pair
    model = both(base, one, two)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear")
    done("combine", f"{one}:0.5", f"{two}:0.5", "-o", tmp_path / "out")
    model.load_adapter(tmp_path / "out", adapter_name="ours")
    for layer in layers(model).values():
        wanted = 0.5 * delta_of(layer, "a") + 0.5 * delta_of(layer, "b")
        assert (delta_of(layer, "c") - wanted).norm() > 0.5 * wanted.norm()
        torch.testing.assert_close(delta_of(layer, "ours"), wanted, atol=1e-5, rtol=1e-4)


def test_ties_at_full_rank_is_pefts(pair, tmp_path: Path) -> None:
    base, one, two = pair
    model = both(base, one, two)
    # PEFT elects signs before it weighs: with weights of 1 that is the same
    model.add_weighted_adapter(
        ["a", "b"], [1.0, 1.0], "c", combination_type="ties_svd", svd_rank=32, density=0.4
    )
    done(
        "combine",
        one,
        two,
        "-o",
        tmp_path / "out",
        "--method",
        "ties",
        "--density",
        0.4,
        "--rank",
        32,
    )
    model.load_adapter(tmp_path / "out", adapter_name="ours")
    for name, layer in layers(model).items():
        torch.testing.assert_close(
            delta_of(layer, "ours"), delta_of(layer, "c"), atol=1e-5, rtol=1e-4, msg=name
        )


def test_peft_computes_with_a_pruned_adapter_what_its_merge_computes(pair, tmp_path: Path) -> None:
    base, one, _ = pair
    done("prune", one, "-o", tmp_path / "out", "--energy", 0.9)
    done("merge", base.path, tmp_path / "out", "-o", tmp_path / "merged")
    same_weights(base.load(tmp_path / "merged"), merged_by_peft(base, (tmp_path / "out", 1)))
    ours, theirs = (
        outputs(base.load(tmp_path / "merged")),
        outputs(unmerged_by_peft(base, tmp_path / "out")),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    ranks = {len(t) for n, t in tensors(tmp_path / "out").items() if "lora_A" in n}
    assert len(ranks) > 1


@pytest.mark.parametrize("kind", ["llama-biased", "gpt2", "bert", "llama-tied"])
def test_peft_finds_the_tuned_model_in_what_was_extracted(bases, tmp_path: Path, kind: str) -> None:
    """Every matrix, norm and bias of the tuned model is another."""
    base = bases(kind)
    tuned = base.load()
    torch.manual_seed(3)
    for p in tuned.parameters():
        p.data += 0.1 * torch.randn_like(p)
    tuned.save_pretrained(tmp_path / "tuned")
    done(
        "extract",
        base.path,
        tmp_path / "tuned",
        "-o",
        tmp_path / "out",
        "--rank",
        96,
        "--save-others",
    )
    done("merge", base.path, tmp_path / "out", "-o", tmp_path / "merged")
    same_weights(base.load(tmp_path / "merged"), tuned)
    found = merged_by_peft(base, (tmp_path / "out", 1))
    torch.testing.assert_close(outputs(found), outputs(tuned), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", ["vera", "lokr"])
def test_peft_computes_with_the_nearest_of_a_lora_what_its_merge_computes(
    pair, tmp_path: Path, variant: str
) -> None:
    base, one, _ = pair
    done("convert", one, "-o", tmp_path / "out", "--to", variant, "--rank", 24)
    done("merge", base.path, tmp_path / "out", "-o", tmp_path / "merged")
    ours, theirs = (
        outputs(base.load(tmp_path / "merged")),
        outputs(unmerged_by_peft(base, tmp_path / "out")),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert (ours - outputs(base.load())).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (
            {"use_rslora": True, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"up_proj": 2.5}},
            (),
        ),
        ({"use_dora": True}, ("--rank", 32)),
    ],
    ids=["scales by module", "DoRA"],
)
def test_what_vllm_can_read_computes_in_peft_what_was_trained(
    bases, tmp_path: Path, settings: dict[str, Any], flags: tuple[object, ...]
) -> None:
    """One rank, alpha equal to it, no patterns and no magnitudes: all that vLLM reads."""
    base, out = bases("llama"), tmp_path / "out"
    one = make_adapter(base, tmp_path / "one", target_modules=TARGETS, **settings)
    done("convert", one, "-o", out, "--for", "vllm", "--base", base.path, *flags)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == (32 if flags else 8)
    assert not any(config[n] for n in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"))
    got, wanted = (outputs(unmerged_by_peft(base, path)) for path in (out, one))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert (got - outputs(base.load())).abs().max() > 1e-3
