"""What PEFT converts or sums wrongly without a word, or refuses, and what is right here.

Its NF4 merges are in test_merge_nf4.py, ways to quantize again in test_merge_requantize.py, what 16 bits round
away in test_merge_rounding.py, sums of factors in test_algebra_peft.py, its other types in test_peft_types.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from merging import done, surgery
from neighbours import make, merged_by_peft, same_parameters
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from tiny import Base, outputs

Bases = Callable[..., Base]
TWO = ["q_proj", "up_proj"]
DORA = LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=TWO)
CONVERTED: dict[str, PeftConfig] = {
    "DoRA": DORA,
    "PiSSA": LoraConfig(r=3, lora_alpha=5, init_lora_weights="pissa", target_modules=TWO),
    "AdaLoRA": AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TWO),
    "OFT": OFTConfig(oft_block_size=8, target_modules=TWO),
    "VeRA": VeraConfig(r=4, target_modules=TWO),
    "LoHa": LoHaConfig(r=3, alpha=5, target_modules=TWO),
    "LoKr": LoKrConfig(r=3, alpha=5, target_modules=TWO),
    "rsLoRA": LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=TWO),
}


@pytest.mark.parametrize("kind", CONVERTED)
def test_as_lora_of_full_rank_it_computes_what_it_did(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base = bases("llama")
    adapter, lora = make(base, tmp_path / "adapter", CONVERTED[kind]), tmp_path / "lora"
    done("convert", adapter, "-o", lora, "--to", "lora", "--rank", 32, "--base", base.path)
    same_parameters(merged_by_peft(base, lora), merged_by_peft(base, adapter), 1e-5)


@pytest.mark.parametrize("kind", ["DoRA", "PiSSA"])
def test_peft_converts_it_to_something_else(bases: Bases, tmp_path: Path, kind: str) -> None:
    base = bases("llama")
    adapter = make(base, tmp_path / "adapter", CONVERTED[kind])
    model = PeftModel.from_pretrained(base.load(), adapter).eval()
    config, state = convert_to_lora(model, rank=32)
    again = get_peft_model(base.load(), config).eval()
    set_peft_model_state_dict(again, state)
    wanted, got = outputs(model), outputs(again)
    assert (got - wanted).norm() > 0.05 * (wanted - outputs(base.load())).norm()


def test_one_dora_alone_is_itself_where_peft_sums_it_to_something_else(
    bases: Bases, tmp_path: Path
) -> None:
    base = bases("llama")
    adapter = make(base, tmp_path / "adapter", DORA)
    model = PeftModel.from_pretrained(base.load(), adapter).eval()
    wanted = outputs(model)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    assert (outputs(model) - wanted).norm() > 0.05 * (wanted - outputs(base.load())).norm()
    lines = ("combine", f"{adapter}:1", "-o", tmp_path / "out")
    done(*lines, "--rank", 32, "--base", base.path)
    same_parameters(merged_by_peft(base, tmp_path / "out"), merged_by_peft(base, adapter), 1e-5)
    name = "model.layers.0.mlp.up_proj.weight"
    for more, missing in (
        ((), "has no small rank of its own. Pass --rank: the nearest of that rank is found"),
        (("--rank", 4), "depends on the weight. Pass --base DIR"),
    ):
        result = surgery("combine", f"{adapter}:1", "-o", tmp_path / "other", *more)
        assert result.exit_code == 2
        assert result.stderr == f"error: {adapter}: {name} is dora, whose change {missing}.\n"


@pytest.mark.parametrize("more", [{"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_one_adapter_alone_is_itself_whatever_its_scale_and_bias(
    bases: Bases, tmp_path: Path, more: dict[str, bool]
) -> None:
    base = bases("llama-biased")
    config = LoraConfig(r=3, lora_alpha=5, target_modules=TWO, **more)
    adapter = make(base, tmp_path / "adapter", config)
    done("combine", f"{adapter}:1", "-o", tmp_path / "out")
    same_parameters(merged_by_peft(base, tmp_path / "out"), merged_by_peft(base, adapter), 1e-6)
