"""Rows of fused projections and stacks of experts, against what transformers computes and what PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from merging import ALPHA, RANK, done, make_adapter, unmerged_by_peft
from safetensors import safe_open
from tiny import TOKENS, VOCAB, Base, make_base, outputs
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTNeoXConfig,
    MptConfig,
    PersimmonConfig,
    Phi3Config,
)

from lorasurgery.operations.layouts.fused_rows import by_name, rows

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": VOCAB,
    "intermediate_size": 48,
}  # fmt: skip
FALCON = {k: v for k, v in _SIZES.items() if k != "intermediate_size"} | {"alibi": False}
CONFIGS = {
    "phi3": Phi3Config(**_SIZES, num_key_value_heads=2, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "persimmon": PersimmonConfig(**_SIZES, qk_layernorm=False),
    "bloom": BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCAB),
    "mpt": MptConfig(d_model=32, n_layers=1, n_heads=4, vocab_size=VOCAB, max_seq_len=16),
    "falcon-new": FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True),
    "falcon-multi-query": FalconConfig(**FALCON, multi_query=True),
    "falcon-by-head": FalconConfig(**FALCON, multi_query=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rows_of_k_and_v_are_what_the_model_puts_into_its_cache(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    config = model.config.to_dict()
    (name, module), *_ = [
        (n, m) for n, m in model.named_modules()
        if (f := by_name(n.rpartition(".")[2], config)) and f.order != "halves"
    ]  # fmt: skip
    for p in module.parameters():
        torch.nn.init.normal_(p)
    seen = []
    module.register_forward_hook(lambda _, __, out: seen.append(out[0, 0].detach().numpy()))
    # at the first position a rotation turns nothing
    with torch.inference_mode():
        cache = model(TOKENS[:1, :1], use_cache=True).past_key_values.layers[0]
    fused = by_name(name.rpartition(".")[2], config)
    assert fused is not None
    lie = rows(fused, config)
    assert lie is not None
    assert lie.total == len(seen[0])
    for part, held in ((1, cache.keys), (2, cache.values)):
        found = seen[0][lie.of(part)].reshape(-1, held.shape[-1])
        wanted = held[0, :, 0].numpy()
        # Falcon repeats a head for each of q's that attend to it
        wanted = wanted[:: len(wanted) // len(found)]
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    index = np.concatenate([lie.of(i) for i in range(3)])
    np.testing.assert_array_equal(np.sort(index), np.arange(lie.total))


SINGLE = {"r": RANK, "lora_alpha": ALPHA}
STACK = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(scope="module", params=["mixtral", "qwen3-moe"])
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(request.param, tmp_path_factory.mktemp(request.param) / "base")


def keys(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_stacks_written_expert_by_expert_are_loaded_by_peft_as_what_they_were(
    moe: Base, tmp_path: Path
) -> None:
    source = make_adapter(moe, tmp_path / "it", target_modules=["q_proj"], target_parameters=STACK)
    one = tmp_path / "single"
    done("convert", source, "--base", moe.path, "-o", one, "--experts", "single")
    again = tmp_path / "again"
    done("convert", one, "--base", moe.path, "-o", again, "--experts", "stacked")
    before, after = keys(source), keys(again)
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        torch.testing.assert_close(after[key], tensor, rtol=0, atol=0)
    # PEFT stacks them itself when it loads them
    theirs = outputs(unmerged_by_peft(moe, source))
    torch.testing.assert_close(outputs(unmerged_by_peft(moe, one)), theirs, rtol=1e-5, atol=1e-5)
    # merged into the base that has them one by one
    done("merge", moe.path, source, "-o", tmp_path / "merged")
    done("merge", moe.path, one, "-o", tmp_path / "merged-single")
    for name, w in moe.load(tmp_path / "merged").state_dict().items():
        assert torch.equal(moe.load(tmp_path / "merged-single").state_dict()[name], w), name


def test_experts_one_by_one_are_stacked_as_peft_stacks_them(moe: Base, tmp_path: Path) -> None:
    source = one_by_one(moe, tmp_path / "single")
    out = tmp_path / "stacked"
    done("convert", source, "--base", moe.path, "-o", out, "--experts", "stacked")
    theirs = unmerged_by_peft(moe, source)
    ours = unmerged_by_peft(moe, out)
    base = outputs(moe.load())
    assert (outputs(theirs) - base).abs().max() > 1e-3
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-5, atol=1e-5)
    # the very factors: in A the expert varies slowest, in B fastest
    wanted = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    found = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    assert found.keys() == wanted.keys()
    for name, p in wanted.items():
        torch.testing.assert_close(found[name], p, rtol=0, atol=0, msg=name)


def one_by_one(base: Base, path: Path) -> Path:
    """An adapter as transformers 4 let PEFT write it: a pair for each expert's matrix."""
    import json

    from safetensors.torch import save_file

    path.mkdir()
    rng = torch.Generator().manual_seed(3)
    held = {}
    with safe_open(base.path / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if ".experts." in name:
                out, in_ = file.get_slice(name).get_shape()
                key = f"base_model.model.{name.removesuffix('.weight')}"
                held[f"{key}.lora_A.weight"] = 0.2 * torch.randn(RANK, in_, generator=rng)
                held[f"{key}.lora_B.weight"] = 0.2 * torch.randn(out, RANK, generator=rng)
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    parts = sorted({key.split(".")[-3] for key in held})
    config = {"peft_type": "LORA", "target_modules": parts, "task_type": "CAUSAL_LM", **SINGLE}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_a_dora_for_each_expert_is_made_of_a_stack_and_merges_as_the_stack_does(
    moe: Base, tmp_path: Path
) -> None:
    source = make_adapter(moe, tmp_path / "it", target_parameters=STACK)
    out = tmp_path / "dora"
    done(
        "convert", source, "--base", moe.path, "-o", out, "--experts", "single", "--to", "dora"
    )  # fmt: skip
    assert any("lora_magnitude_vector" in key for key in keys(out))
    done("merge", moe.path, source, "-o", tmp_path / "merged")
    done("merge", moe.path, out, "-o", tmp_path / "merged-dora")
    one, two = (moe.load(tmp_path / name) for name in ("merged", "merged-dora"))
    wanted = dict(one.named_parameters())
    # a norm over at most 48 columns is divided by itself
    for name, p in two.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=2e-6, atol=2e-6, msg=name)
