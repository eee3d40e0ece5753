"""Fused and split projections: the same change of the same rows, whichever way the weights are stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algebra import cli, deltas, facts, fails, write_lora
from handmade import adapter, lora, numbers, site
from handmade import delta as delta_of
from safetensors.numpy import load_file, save_file

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.dialects import peft
from lorasurgery.errors import MatchError
from lorasurgery.operations.layouts.fused_rows import by_name, rows
from lorasurgery.operations.layouts.projections_fused import fuse
from lorasurgery.operations.layouts.projections_split import _BY_ROWS, split
from lorasurgery.tensors import TensorInfo

HIDDEN, WIDE, HEADS, KV, HEAD = 24, 20, 4, 2, 6
Q, K = HEADS * HEAD, KV * HEAD
PHI = {
    "model_type": "phi3", "hidden_size": HIDDEN, "num_attention_heads": HEADS,
    "num_key_value_heads": KV, "intermediate_size": WIDE,
}  # fmt: skip
AT = "model.layers.0."
PARTS = {"q_proj": Q, "k_proj": K, "v_proj": K}
ATTENTION = {f"{AT}self_attn.{name}": out for name, out in PARTS.items()}
MLP = {f"{AT}mlp.gate_proj": WIDE, f"{AT}mlp.up_proj": WIDE}


def base(path: Path, config: Mapping[str, Any], modules: Mapping[str, int], seed: int = 0) -> Path:
    """A model of these matrices [out, HIDDEN] in float32."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    held = {
        f"{name}.weight": rng.standard_normal((out, HIDDEN)).astype(np.float32)
        for name, out in modules.items()
    }
    save_file(held, path / "model.safetensors", {"format": "pt"})
    return path


def fused_base(path: Path, parts: Path) -> Path:
    """The same weights with q, k, v and gate, up row on row."""
    held = load_file(parts / "model.safetensors")

    def of(*names: str) -> np.ndarray:
        return np.concatenate([held[f"{AT}{name}.weight"] for name in names])

    made = {
        f"{AT}self_attn.qkv_proj.weight": of(*(f"self_attn.{name}" for name in PARTS)),
        f"{AT}mlp.gate_up_proj.weight": of("mlp.gate_proj", "mlp.up_proj"),
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps(PHI))
    save_file(made, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """The weights split and fused."""
    apart = base(tmp_path / "apart", PHI | {"model_type": "llama"}, ATTENTION | MLP)
    return apart, fused_base(tmp_path / "together", apart)


def fused_lora(path: Path, **fields: Any) -> Path:
    modules = {
        f"{AT}self_attn.qkv_proj": (Q + 2 * K, HIDDEN, 3, 1.0),
        f"{AT}mlp.gate_up_proj": (2 * WIDE, HIDDEN, 2, 1.0),
    }
    return write_lora(path, modules, **fields)


def merged(path: Path, of: Path, by: Path) -> dict[str, np.ndarray]:
    code, _, stderr = cli("merge", of, by, "-o", path)
    assert code == 0, stderr
    return load_file(path / "model.safetensors")


def same_merged(tmp_path: Path, models: tuple[Path, Path], apart: Path, together: Path) -> None:
    """merge(split) is split(merge), to the bit."""
    one = merged(tmp_path / "merged-apart", models[0], apart)
    two = merged(tmp_path / "merged-together", models[1], together)
    qkv = [one[f"{name}.weight"] for name in ATTENTION]
    np.testing.assert_array_equal(np.concatenate(qkv), two[f"{AT}self_attn.qkv_proj.weight"])
    halves = [one[f"{name}.weight"] for name in MLP]
    np.testing.assert_array_equal(np.concatenate(halves), two[f"{AT}mlp.gate_up_proj.weight"])


def test_a_fused_lora_is_split_exactly_and_merges_to_the_same_bits(models, tmp_path):
    source = fused_lora(tmp_path / "it", use_rslora=True)
    report = facts(
        "convert", source, "--base", models[1], "-o", tmp_path / "out", "--projections", "split"
    )
    assert report["total"]["modules"] == report["total"]["exact_modules"] == 5
    found = peft.read(tmp_path / "out").sites
    assert {s.module: s.factors["B"].shape[0] for s in found} == ATTENTION | MLP
    assert [s.config.rank for s in found] == [2, 2, 3, 3, 3]
    same_merged(tmp_path, models, tmp_path / "out", source)


def test_a_split_dora_merges_to_the_same_bits(models, tmp_path):
    plain = fused_lora(tmp_path / "plain")
    dora = tmp_path / "dora"
    assert cli("convert", plain, "--base", models[1], "-o", dora, "--to", "dora")[0] == 0
    code, _, stderr = cli(
        "convert", dora, "--base", models[1], "-o", tmp_path / "out", "--projections", "split"
    )
    assert code == 0, stderr
    found = peft.read(tmp_path / "out").sites
    assert {s.config.variant for s in found} == {"dora"}
    same_merged(tmp_path, models, tmp_path / "out", dora)


def test_there_and_back_is_the_same_adapter(models, tmp_path):
    source = fused_lora(tmp_path / "it")
    for there, of, to in (("split", source, "apart-lora"), ("fused", "apart-lora", "again")):
        code, _, stderr = cli(
            "convert",
            tmp_path / of,
            "--base",
            models[1],
            "-o",
            tmp_path / to,
            "--projections",
            there,
        )
        assert code == 0, stderr
    before, after = peft.read(source), peft.read(tmp_path / "again")
    assert [s.module for s in after.sites] == [s.module for s in before.sites]
    for one, two in zip(before.sites, after.sites, strict=True):
        assert two.config == one.config
        held, again = one.load(), two.load()
        for name in "AB":
            np.testing.assert_array_equal(again[name], held[name])


def split_lora(path: Path, names: Mapping[str, int], **fields: Any) -> Path:
    return write_lora(path, {n: (out, HIDDEN, 3, 1.0) for n, out in names.items()}, **fields)


def test_split_loras_are_fused_at_the_sum_of_their_ranks_and_merge_to_the_same_bits(
    models, tmp_path
):
    source = split_lora(tmp_path / "it", ATTENTION | MLP)
    report = facts(
        "convert", source, "--base", models[1], "-o", tmp_path / "out", "--projections", "fused"
    )
    assert report["total"]["exact_modules"] == 2
    found = {s.module: s.config for s in peft.read(tmp_path / "out").sites}
    assert found == {
        f"{AT}self_attn.qkv_proj": AdapterConfig("lora", 9, 21.0),
        f"{AT}mlp.gate_up_proj": AdapterConfig("lora", 6, 14.0),
    }
    same_merged(tmp_path, models, source, tmp_path / "out")


def test_parts_that_differ_in_rank_and_scale_are_fused_with_the_scale_in_b(models, tmp_path):
    modules = {
        f"{AT}self_attn.q_proj": (Q, HIDDEN, 3, 1.0),
        f"{AT}self_attn.v_proj": (K, HIDDEN, 5, 1.0),
    }
    for flag in (False, True):
        source = write_lora(tmp_path / f"it-{flag}", modules, use_rslora=flag)
        out = tmp_path / f"out-{flag}"
        code, _, stderr = cli(
            "convert", source, "--base", models[1], "-o", out, "--projections", "fused"
        )
        assert code == 0, stderr
        ((module, found),) = deltas(out).items()
        wanted = deltas(source)
        zeros = np.zeros((K, HIDDEN))
        parts = [wanted[f"{AT}self_attn.q_proj"], zeros, wanted[f"{AT}self_attn.v_proj"]]
        assert module == f"{AT}self_attn.qkv_proj"
        # the scale is rounded into B once
        np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-6, atol=1e-7)


def test_with_a_rank_the_nearest_is_found_and_its_error_is_stated(models, tmp_path):
    source = split_lora(tmp_path / "it", ATTENTION)
    report = facts(
        "convert", source, "--base", models[1], "-o", tmp_path / "out", "--projections", "fused",
        "--rank", 4,
    )  # fmt: skip
    parts = deltas(source)
    whole = np.concatenate([parts[name] for name in ATTENTION])
    s = np.linalg.svd(whole, compute_uv=False)
    lost = np.sqrt(np.square(s[4:]).sum() / np.square(s).sum())
    assert report["total"]["relative_error"] == pytest.approx(lost, rel=1e-4)
    ((_, found),) = deltas(tmp_path / "out").items()
    error = np.linalg.norm(found - whole) / np.linalg.norm(whole)
    assert error == pytest.approx(lost, rel=1e-4)


def dora(module: str, out: int, config: AdapterConfig | None = None) -> Site:
    return lora(module, out, HIDDEN, config or AdapterConfig("dora", 3, 6.0))


def test_doras_are_fused_with_their_magnitudes_row_by_row():
    made = adapter([dora(name, out) for name, out in ATTENTION.items()])
    (found,) = fuse(made, PHI).adapter.sites
    magnitudes = [site.load()["m"] for site in made.sites]
    np.testing.assert_array_equal(found.load()["m"], np.concatenate(magnitudes))
    np.testing.assert_array_equal(
        delta_of(found), np.concatenate([delta_of(site) for site in made.sites])
    )


@pytest.mark.parametrize("variant", _BY_ROWS)
def test_a_part_changes_its_rows_as_the_whole_does(variant):
    """The law behind it: of every variant that is split, ΔW of some rows is made of these rows alone."""
    module = plugins.load("adapters", variant)
    config = AdapterConfig(variant, 3, 7.0)
    shapes = module.shapes(Q + 2 * K, HIDDEN, config)
    factors = {n: 1 + numbers(shape, i) for i, (n, shape) in enumerate(shapes.items())}
    whole = site("m.qkv_proj", config, factors)
    w = numbers((Q + 2 * K, HIDDEN), 9)
    parts = split(adapter([whole]), PHI).adapter.sites
    rows_of = np.split(w, [Q, Q + K])
    found = [
        module.delta(rows, part.load(), part.config)
        for rows, part in zip(rows_of, parts, strict=True)
    ]
    # a product of more rows may be summed in another order
    np.testing.assert_allclose(
        np.concatenate(found), module.delta(w, factors, config), rtol=1e-5, atol=1e-4
    )


ORDERS = {
    # one group for each head, with its q, k and v
    "gpt_neox": ({"num_attention_heads": 2, "hidden_size": 6}, "q0 q1 q2 k0 k1 k2 v0 v1 v2 q3 q4 q5 k3 k4 k5 v3 v4 v5"),
    # two heads of q for each of k and v
    "falcon": (
        {"num_attention_heads": 4, "hidden_size": 8, "num_kv_heads": 2, "new_decoder_architecture": True},
        "q0 q1 q2 q3 k0 k1 v0 v1 q4 q5 q6 q7 k2 k3 v2 v3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ORDERS)
def test_rows_that_are_interleaved_by_head_are_dealt_out_in_order(kind):
    config, said = ORDERS[kind]
    config = {"model_type": kind, **config}
    order = said.split()
    a, b = numbers((2, 6)), numbers((len(order), 2), 1)
    whole = replace(
        lora("h.query_key_value", len(order), 6),
        config=AdapterConfig("lora", 2, 5.0),
        factors={n: TensorInfo(n, "F32", f.shape) for n, f in (("A", a), ("B", b))},
        load=lambda: {"A": a, "B": b},
    )
    made = split(adapter([whole]), config).adapter
    for part in made.sites:
        letter = part.module[2]
        wanted = [b[order.index(f"{letter}{i}")] for i in range(sum(n[0] == letter for n in order))]
        np.testing.assert_array_equal(part.load()["B"], wanted)
    (again,) = fuse(made, config).adapter.sites
    assert again.module == whole.module
    np.testing.assert_array_equal(again.load()["B"], b)


def test_biases_and_whole_tensors_go_along():
    whole = lora("m.qkv_proj", Q + 2 * K, HIDDEN)
    bias, added = numbers((Q + 2 * K,), 7), numbers((Q + 2 * K,), 8)
    info = TensorInfo("m.qkv_proj.bias", "F32", bias.shape)
    made = adapter(
        [whole], replaced={info.name: info}, added={info.name: info},
        load={info.name: bias}.__getitem__, load_added={info.name: added}.__getitem__,
    )  # fmt: skip
    apart = split(made, PHI).adapter
    assert {n: i.shape for n, i in apart.replaced.items()} == {
        f"m.{part}.bias": (out,) for part, out in PARTS.items()
    }
    np.testing.assert_array_equal(apart.load("m.k_proj.bias"), bias[Q : Q + K])
    np.testing.assert_array_equal(apart.load_added("m.v_proj.bias"), added[Q + K :])
    again = fuse(apart, PHI).adapter
    np.testing.assert_array_equal(again.load(info.name), bias)
    np.testing.assert_array_equal(again.load_added(info.name), added)
    alone = replace(apart, replaced={"m.q_proj.bias": apart.replaced["m.q_proj.bias"]})
    assert refused(fuse, alone, PHI) == (
        "m.q_proj.bias is replaced as a whole, and m.k_proj.bias beside it is not, so that m.qkv_proj cannot be. "
        "Merge it."
    )


def refused(work: Any, made: Adapter, config: Mapping[str, Any]) -> str:
    with pytest.raises(MatchError) as error:
        work(made, config)
    return str(error.value).removeprefix("made/by-hand: ")


def test_what_cannot_be_split_is_refused_in_one_line():
    qkv = lora("m.qkv_proj", Q + 2 * K, HIDDEN)
    assert refused(split, adapter([qkv]), {}) == (
        "how many rows of m.qkv_proj are whose follows from the base's config.json (heads and their size). "
        "Pass --base DIR."
    )
    assert refused(split, adapter([lora("m.qkv_proj", 40, HIDDEN)]), PHI) == (
        "m.qkv_proj has 40 rows, but by the base's config.json q_proj, k_proj, v_proj have 24 + 12 + 12. "
        "Check --base."
    )
    loha = replace(qkv, config=AdapterConfig("loha", 2, 3.0))
    assert refused(split, adapter([loha]), PHI) == (
        "m.qkv_proj is a loha, whose change does not fall apart by rows. Convert it first: lorasurgery convert "
        "--to lora."
    )
    # a Conv1D stays one, and CodeGen's order is another
    for module, kind in (("h.c_attn", "gpt2"), ("h.qkv_proj", "codegen")):
        assert refused(split, adapter([lora(module, 48, HIDDEN)]), PHI | {"model_type": kind}) == (
            "none of its modules is fused of a projection whose rows are known (query_key_value, Wqkv, c_attn, "
            "W_pack, qkv_proj, gate_up_proj). Check --base, or leave --projections out."
        )


def test_what_cannot_be_fused_is_refused_in_one_line():
    q = lora("m.q_proj", Q, HIDDEN)
    assert refused(fuse, adapter([q]), {}) == (
        "how many rows of m.qkv_proj are whose follows from the base's config.json (heads and their size). "
        "Pass --base DIR."
    )
    assert refused(fuse, adapter([lora("m.q_proj", 6, HIDDEN)]), PHI) == (
        "m.q_proj has 6 rows, but by the base's config.json 24. Check --base."
    )
    assert refused(fuse, adapter([dora("m.q_proj", Q)]), PHI) == (
        "m.qkv_proj would be a dora, but k_proj, v_proj beside m.q_proj has no magnitudes. Convert it first: "
        "lorasurgery convert --to lora."
    )
    assert refused(fuse, adapter([q, lora("m.k_proj", K, 8)]), PHI) == (
        "the parts of m.qkv_proj are not of one variant and one width, so that they are no parts of one "
        "projection. Leave the layout as it is."
    )
    vera = replace(q, config=AdapterConfig("vera", 2, 3.0))
    assert refused(fuse, adapter([vera]), PHI) == (
        "m.q_proj is a vera, and lora and dora alone are put together. Convert it first: lorasurgery convert "
        "--to lora."
    )
    assert refused(fuse, adapter([lora("m.o_proj", Q, HIDDEN)]), PHI) == (
        "none of its modules is a part of a projection whose rows are known (q_proj, k_proj, v_proj, gate_proj, "
        "up_proj). Check --base, or leave --projections out."
    )


def test_a_bias_that_is_adapted_by_itself_would_be_left_behind():
    for work, name in ((split, "qkv_proj"), (fuse, "q_proj")):
        bias = replace(lora(f"m.{name}", Q, 1), parameter="bias")
        assert refused(work, adapter([bias]), PHI) == (
            f"m.{name}.bias is adapted by itself, and matrices alone change their layout. Merge it."
        )


def test_a_flag_that_is_no_layout_is_answered_with_the_nearest(tmp_path):
    source = fused_lora(tmp_path / "it")
    assert fails("convert", source, "-o", tmp_path / "out", "--projections", "splitt") == (
        1, "--projections splitt: is no layout. Did you mean 'split'?",
    )  # fmt: skip
    assert fails("convert", source, "-o", tmp_path / "out", "--for", "vllm", "--experts", "single") == (
        2, "--for: decides on ranks, scale and layout itself. Take the others away.",
    )  # fmt: skip


def test_the_table_has_one_entry_for_a_name_in_a_model():
    for kind in ("gpt_neox", "falcon", "mpt", "qwen", "baichuan", "phi3", "llama"):
        config = PHI | {"model_type": kind}
        for name in ("query_key_value", "Wqkv", "c_attn", "W_pack", "qkv_proj", "gate_up_proj"):
            entry = by_name(name, config)
            if entry is not None:
                lie = rows(entry, config)
                assert lie is not None
                index = np.concatenate([lie.of(i) for i in range(len(entry.parts))])
                np.testing.assert_array_equal(np.sort(index), np.arange(lie.total))
