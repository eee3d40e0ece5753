"""inspect on adapters that PEFT itself saved, of every variant that it is to recognise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
)
from tiny import llama, mixtral

from lorasurgery.operations.inspect import inspect

TARGETS = ["q_proj", "v_proj"]
COMMON: dict[str, Any] = {"target_modules": TARGETS}


def adapter(model: Any, config: Any, out: Path) -> dict[str, Any]:
    get_peft_model(model, config).save_pretrained(out)
    found = inspect(str(out)).adapter
    assert found is not None
    return dict(found)


@pytest.mark.parametrize(
    ("config", "variant", "ranks", "alphas"),
    [
        (LoraConfig(r=4, lora_alpha=6, **COMMON), "lora", {4: 4}, [6.0]),
        (
            LoraConfig(
                r=4, lora_alpha=6, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 9}, **COMMON
            ),
            "lora", {2: 2, 4: 2}, [6.0, 9.0],
        ),
        (LoraConfig(r=4, lora_alpha=6, use_dora=True, **COMMON), "dora", {4: 4}, [6.0]),
        (AdaLoraConfig(init_r=5, lora_alpha=6, total_step=9, tinit=1, tfinal=1, **COMMON), "adalora", {5: 4}, [6.0]),
        (VeraConfig(r=7, **COMMON), "vera", {7: 4}, []),
        (LoHaConfig(r=3, alpha=6, **COMMON), "loha", {3: 4}, [6.0]),
        (OFTConfig(oft_block_size=8, **COMMON), "oft", {}, []),
        (IA3Config(target_modules=TARGETS, feedforward_modules=[]), "ia3", {}, []),
    ],
)  # fmt: skip
def test_a_variant_is_told_with_its_ranks_and_alphas(
    tmp_path: Path, config: Any, variant: str, ranks: dict[int, int], alphas: list[float]
) -> None:
    found = adapter(llama(num_key_value_heads=4), config, tmp_path)
    assert (found["layout"], found["variant"]) == ("peft", variant)
    assert (found["ranks"], found["alphas"]) == (ranks, alphas)
    assert (found["modules"], found["targets"]) == (4, TARGETS)


def test_lokr_has_ranks_where_it_is_factored(tmp_path: Path) -> None:
    found = adapter(llama(), LoKrConfig(r=2, alpha=6, **COMMON), tmp_path)
    assert (found["variant"], found["modules"], found["alphas"]) == ("lokr", 4, [6.0])


def test_what_is_replaced_is_no_target(tmp_path: Path) -> None:
    config = LoraConfig(r=4, modules_to_save=["lm_head"], use_rslora=True, **COMMON)
    found = adapter(llama(), config, tmp_path)
    assert (found["modules_to_save"], found["targets"]) == (["lm_head"], TARGETS)
    assert found["rank_stabilized"]


def test_embeddings_are_targets_with_the_same_rank(tmp_path: Path) -> None:
    found = adapter(llama(), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]), tmp_path)
    assert (found["ranks"], found["targets"]) == ({4: 3}, ["embed_tokens", "q_proj"])


def test_the_rank_of_fused_experts_is_the_configs_not_the_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    found = adapter(mixtral(), config, tmp_path)
    assert found["ranks"] == {2: 6}
