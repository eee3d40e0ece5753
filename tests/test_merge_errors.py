"""What cannot be merged is refused before a byte is written: in one line, with both sides and the way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from merge_files import (
    IN,
    LAYER,
    OUT,
    PREFIX,
    RANK,
    TOKENS,
    Q,
    V,
    adapter,
    array,
    factors,
    make_base,
    refused,
    says,
    surgery,
)
from safetensors.numpy import load_file


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def test_what_is_right_is_merged(base: Path) -> None:
    # so that each refusal below is due to what it changes
    path = adapter(base.parent / "adapter", {**factors(Q), **factors(V)})
    result = surgery("merge", base, path, "-o", base.parent / "out")
    assert result.exit_code == 0, result.stderr
    before = load_file(base / "model.safetensors")
    after = load_file(base.parent / "out/model.safetensors")
    a, b = factors(Q).values()
    np.testing.assert_allclose(
        after[f"{Q}.weight"], before[f"{Q}.weight"] + 5 / RANK * b @ a, rtol=1e-5, atol=1e-5
    )


def test_a_module_that_the_base_lacks_is_refused_with_the_nearest_name_and_the_flag(
    base: Path,
) -> None:
    module = f"{LAYER}q_pro"
    path = adapter(base.parent / "a", factors(module), {"target_modules": ["q_pro"]})
    says(
        refused(base, path), path, f"{module}.weight", base, f"{Q}.weight",
        f"--allow-unmatched '{PREFIX}{module}.lora_A.weight'",
    )  # fmt: skip


def test_a_layer_that_the_base_lacks_is_refused(base: Path) -> None:
    module = "model.layers.7.self_attn.q_proj"
    path = adapter(base.parent / "a", {**factors(Q), **factors(module)})
    says(refused(base, path), f"{module}.weight", base, "--allow-unmatched")


def test_all_that_belongs_nowhere_is_counted(base: Path) -> None:
    lost = [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2, 3)]
    found = {key: t for module in lost for key, t in factors(module).items()}
    path = adapter(base.parent / "a", {**factors(Q), **found})
    says(refused(base, path), lost[0], "2 more", lost[1])


def test_a_module_that_the_config_does_not_name_is_refused(base: Path) -> None:
    # PEFT would leave these factors lying, and say nothing
    config = {"target_modules": ["q_proj"]}
    path = adapter(base.parent / "a", {**factors(Q), **factors(V)}, config)
    says(refused(base, path), f"{V}.lora_A.weight", "['q_proj']", V, "--allow-unmatched")


@pytest.mark.parametrize("missing", ["A", "B"])
def test_half_a_pair_is_refused(base: Path, missing: str) -> None:
    found = {**factors(Q), **factors(V)}
    del found[f"{PREFIX}{V}.lora_{missing}.weight"]
    path = adapter(base.parent / "a", found)
    says(refused(base, path), f"lora_{missing} of {V}", "missing")


def test_a_factor_of_an_unknown_kind_is_refused(base: Path) -> None:
    key = f"{PREFIX}{Q}.lora_C.weight"
    path = adapter(base.parent / "a", {**factors(Q), key: array(RANK, RANK)})
    says(refused(base, path), key, "[3, 3]", "--allow-unmatched", key)


def test_a_whole_tensor_that_the_config_does_not_announce_is_refused(base: Path) -> None:
    key = f"{PREFIX}{V}.weight"
    path = adapter(base.parent / "a", {**factors(Q), key: array(OUT, IN)})
    says(refused(base, path), key, f"[{OUT}, {IN}]", "--allow-unmatched")


def test_a_head_is_taken_unannounced_for_peft_saves_it_where_it_was_resized(base: Path) -> None:
    head = array(TOKENS + 2, IN)
    path = adapter(base.parent / "a", {**factors(Q), f"{PREFIX}lm_head.weight": head})
    result = surgery("merge", base, path, "-o", base.parent / "out")
    assert result.exit_code == 0, result.stderr
    after = load_file(base.parent / "out/model.safetensors")
    np.testing.assert_array_equal(after["lm_head.weight"], head)


def test_a_bias_for_a_module_without_one_is_refused(base: Path) -> None:
    # PEFT refuses it too, with a RuntimeError and no name
    found = {**factors(Q), f"{PREFIX}{Q}.lora_B.bias": array(OUT)}
    path = adapter(base.parent / "a", found, {"lora_bias": True})
    says(refused(base, path), f"{Q}.bias", base)


def test_what_is_allowed_is_left_out_and_said(base: Path) -> None:
    module = "model.layers.7.self_attn.q_proj"
    path = adapter(base.parent / "a", {**factors(Q), **factors(module)})
    flags = ("--allow-unmatched", "*layers.7.*")
    result = surgery("merge", base, path, "-o", base.parent / "out", *flags)
    assert result.exit_code == 0, result.stderr
    assert module in result.stderr
    before = load_file(base / "model.safetensors")
    after = load_file(base.parent / "out/model.safetensors")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {f"{Q}.weight"}
    assert after.keys() == before.keys()


def test_a_pattern_that_allows_nothing_is_an_error(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    says(refused(base, path, flags=("--allow-unmatched", "*k_proj*")), "*k_proj*")


def test_nothing_left_to_merge_is_an_error(base: Path) -> None:
    module = "model.layers.7.self_attn.q_proj"
    path = adapter(base.parent / "a", factors(module))
    flags = ("--allow-unmatched", "*layers.7*")
    says(refused(base, path, code=2, flags=flags), "nothing")


@pytest.mark.parametrize(("in_", "out"), [(IN + 1, OUT), (IN, OUT + 2), (OUT, IN)])
def test_factors_for_another_shape_are_refused(base: Path, in_: int, out: int) -> None:
    path = adapter(base.parent / "a", factors(Q, in_, out))
    says(
        refused(base, path), Q, f"[{RANK}, {in_}]", f"[{out}, {RANK}]", f"[{out}, {in_}]",
        f"{Q}.weight", base, f"[{OUT}, {IN}]",
    )  # fmt: skip


def test_a_and_b_of_different_ranks_are_refused(base: Path) -> None:
    found = {**factors(Q), f"{PREFIX}{Q}.lora_B.weight": array(OUT, RANK + 1)}
    says(refused(base, adapter(base.parent / "a", found)), Q, "[3, 12]", "[8, 4]")


def test_factors_of_another_rank_than_the_config_says_are_refused(base: Path) -> None:
    # alpha / r would be another: a quarter of the change too much
    path = adapter(base.parent / "a", factors(Q), {"r": 4})
    says(refused(base, path), Q, "[3, 12]", "[8, 3]", "4")


def test_a_rank_pattern_that_the_file_contradicts_is_refused(base: Path) -> None:
    config = {"rank_pattern": {"q_proj": 2}}
    says(refused(base, adapter(base.parent / "a", factors(Q), config)), Q, "[3, 12]", "2")


def test_a_whole_tensor_of_another_width_is_refused(base: Path) -> None:
    found = {**factors(Q), f"{PREFIX}lm_head.weight": array(TOKENS, IN + 1)}
    path = adapter(base.parent / "a", found, {"modules_to_save": ["lm_head"]})
    says(refused(base, path), "lm_head.weight", f"[{TOKENS}, {IN + 1}]", f"[{TOKENS}, {IN}]")


def test_a_bias_of_another_size_is_refused(base: Path) -> None:
    found = {**factors(V), f"{PREFIX}{V}.lora_B.bias": array(OUT + 1)}
    path = adapter(base.parent / "a", found, {"lora_bias": True})
    says(refused(base, path), f"{V}.bias", f"[{OUT + 1}]", f"[{OUT}]")


def test_a_change_that_is_not_finite_is_refused_by_the_tensors_name(base: Path) -> None:
    found = factors(Q)
    found[f"{PREFIX}{Q}.lora_A.weight"][1, 2] = np.nan
    says(refused(base, adapter(base.parent / "a", found)), f"{Q}.weight")
