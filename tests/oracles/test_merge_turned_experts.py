"""Stacks of experts as PEFT before 0.19 trained them: factors of the transpose, wherever the base keeps its experts.

It asked no model whether its stacks are [experts, out, in], and took all for [experts, in, out], as today's PEFT
does where a module says `is_transposed`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_cases import BOTH, STACK
from merging import ALPHA, RANK, done, same_weights, surgery
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import Base

Bases = Callable[..., Base]
LIVE = [f"model.layers.1.{name}" for name in BOTH]
KINDS = ["mixtral", "mixtral-fused", "qwen3-moe"]


def as_before(base: Base) -> Any:
    model: Any = base.load()
    for module in model.modules():
        if hasattr(module, "gate_up_proj"):
            module.is_transposed = True
    return model


def old(base: Base, path: Path) -> Path:
    """Rank and alpha by pattern, too."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, rank_pattern={"down_proj": 2}, **STACK)
    adapted = get_peft_model(as_before(base), config)
    torch.manual_seed(1)
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted.save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_an_older_stack_is_merged_as_it_was_trained_and_undone(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base = bases(kind)
    adapter, merged, undo = old(base, tmp_path / "adapter"), tmp_path / "merged", tmp_path / "undo"
    done("merge", base.path, adapter, "-o", merged, "--undo", undo)
    wanted: Any = PeftModel.from_pretrained(as_before(base), adapter).merge_and_unload().eval()
    before = dict(base.load().named_parameters())
    for name in LIVE:
        assert (dict(wanted.named_parameters())[name] - before[name]).norm() > 0.1
    same_weights(base.load(merged), wanted)
    done("verify", merged, "--base", base.path, "--adapter", adapter)
    done("unmerge", merged, adapter, "-o", tmp_path / "back", "--undo", undo)
    for file in base.path.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_of_an_older_stack_is_held_against_the_right_weights(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base = bases(kind)
    adapter, cut = old(base, tmp_path / "adapter"), tmp_path / "cut"
    found = done("convert", adapter, "-o", cut, "--rank", 1, "--base", base.path, "--json")
    stated = json.loads(found.stdout)["tensors"]
    live = [dict(base.load(p).named_parameters()) for p in _merged(base, tmp_path, adapter, cut)]
    for name in LIVE:
        whole, less = (model[name].double() for model in live)
        error = ((whole - less).norm() / whole.norm()).item()
        assert stated[name]["weight_error"] == pytest.approx(error, rel=1e-3)


def _merged(base: Base, folder: Path, *adapters: Path) -> list[Path]:
    for i, adapter in enumerate(adapters):
        done("merge", base.path, adapter, "-o", folder / f"merged{i}")
    return [folder / f"merged{i}" for i in range(len(adapters))]


def test_a_stack_that_fits_neither_way_is_refused(bases: Bases, tmp_path: Path) -> None:
    base, other = bases("mixtral"), bases("qwen3-moe")
    adapter = old(base, tmp_path / "adapter")
    at, key = (
        "model.layers.0.mlp.experts",
        "base_model.model.model.layers.{}.mlp.experts{}.lora_A.weight",
    )
    first, *more = [key.format(i, part) for i in (0, 1) for part in (".base_layer", "")]
    result = surgery("merge", other.path, adapter, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {adapter}: {at}: A [4, 3, 96] and B [4, 32, 3] make a change of [32, 96], but "
        f"{at}.0.gate_proj.weight in {other.path} is [24, 32] (3 more like it: {', '.join(more)}). Mend it, or "
        f"leave it out with --allow-unmatched '{first}'.\n"
    )
