"""Every type of the installed PEFT is read or refused; what its own layers merge becomes LoRA by SVD."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from merging import done, surgery
from neighbour_cases import IA3, OTHERS
from neighbours import Case, make, merged_by_peft, same_parameters
from peft import PeftType
from safetensors.torch import load_file, save_file
from tiny import Base
from torch import Tensor

from lorasurgery.dialects._peft_other_types import TYPES
from lorasurgery.dialects._peft_types_refused import REFUSED

Bases = Callable[..., Base]
# what has a form of its own, held against PEFT in other files of this directory
FORMED = {"LORA", "ADALORA", "VERA", "LOHA", "LOKR", "OFT", "IA3"}
# the last case of each type whose changes are of weights that LoRA can hold
LINEAR = {
    case.config.peft_type: case
    for case in OTHERS
    if case.config.peft_type not in ("LN_TUNING", "BEFT", "TRAINABLE_TOKENS")
}
# whose files keep a copy of the base's embedding, which PEFT's start would fail at before the change
EMBEDDED = [case for case in OTHERS if case.name.endswith("with an embedding")]
# and those which change biases too, which LoRA holds as what is added to them
BIASED = [
    case for case in [*OTHERS, *IA3] if {"ROAD", "GLORA", "IA3"} & {case.config.peft_type.value}
    and case.kind == "llama-biased"
]  # fmt: skip


@pytest.mark.parametrize("kind", list(PeftType), ids=lambda kind: kind.value)
def test_a_type_is_held_against_peft_or_refused_with_a_reason(kind: PeftType) -> None:
    name = kind.value
    assert [name in FORMED, name in TYPES, name in REFUSED].count(True) == 1
    if name in TYPES:
        assert name in {case.config.peft_type.value for case in OTHERS}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_merged_weight_computes_is_refused_in_one_line(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    result = surgery("merge", bases("llama").path, tmp_path, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"error: {tmp_path}/adapter_config.json: {kind} {REFUSED[kind]}.\n"


@pytest.mark.parametrize("case", [*LINEAR.values(), *BIASED], ids=str)
def test_as_lora_of_full_rank_it_is_merged_as_before(
    bases: Bases, tmp_path: Path, case: Case
) -> None:
    base = bases(case.kind)
    adapter, lora = make(base, tmp_path / "adapter", case.config), tmp_path / "lora"
    done("convert", adapter, "-o", lora, "--to", "lora", "--rank", 32, "--base", base.path)
    same_parameters(merged_by_peft(base, lora), merged_by_peft(base, adapter), 1e-5)


@pytest.mark.parametrize("case", [*LINEAR.values(), *EMBEDDED], ids=str)
def test_a_factor_that_is_missing_or_holds_nan_is_one_error(
    bases: Bases, tmp_path: Path, case: Case
) -> None:
    base = bases(case.kind)
    whole = make(base, tmp_path / "adapter", case.config)
    held = load_file(whole / "adapter_model.safetensors")
    module = case.changes[0].removesuffix(".weight")
    own = [key for key in held if f".{module}." in key] or list(held)
    for n, key in enumerate(own):
        spoilt = {k: t.clone() for k, t in held.items()}
        if (
            held[key].is_floating_point() and held[key].any()
        ):  # GLoRA saves what it has not as zeros
            spoilt[key].view(-1)[0] = float("nan")
            one_error(base, replaced(whole, f"nan{n}", spoilt))
        if len(own) > 1 and not key.endswith("base_layer.weight"):
            one_error(
                base, replaced(whole, f"less{n}", {k: t for k, t in held.items() if k != key})
            )


def replaced(whole: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """A copy of an adapter with these tensors."""
    folder = shutil.copytree(whole, whole.parent / name)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def one_error(base: Base, adapter: Path) -> None:
    result = surgery("merge", base.path, adapter, "-o", adapter.parent / "out")
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 1, adapter
    assert result.stderr.count("\n") == 1, result.stderr
    assert not list(adapter.parent.glob("out*"))
