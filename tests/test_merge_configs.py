"""Configs that say more than is understood, and paths that hold no adapter, are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_files import (
    IN,
    OUT,
    PREFIX,
    TOKENS,
    Q,
    adapter,
    array,
    factors,
    make_base,
    refused,
    says,
    surgery,
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def test_an_unknown_field_is_refused_with_the_nearest_and_the_flag(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q), {"use_rslorra": True})
    says(refused(base, path), "use_rslorra", "use_rslora", "--allow-unmatched 'use_rslorra'")


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_field_that_says_nothing_is_let_pass(base: Path, value: object) -> None:
    path = adapter(base.parent / "a", factors(Q), {"use_something_new": value})
    result = surgery("merge", base, path, "-o", base.parent / "out")
    assert result.exit_code == 0, result.stderr


def test_an_unknown_field_may_be_allowed(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q), {"note": "by hand"})
    flags = ("--allow-unmatched", "note")
    result = surgery("merge", base, path, "-o", base.parent / "out", *flags)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "NEW"])
def test_another_method_is_refused_by_its_name(base: Path, kind: str) -> None:
    path = adapter(base.parent / "a", factors(Q), {"peft_type": kind})
    says(refused(base, path), path, kind)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True), ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}), ("kasa_config", {"beta": 1}),
        ("use_bdlora", {"nblocks": 2}), ("layer_replication", [[0, 1], [0, 1]]),
        ("trainable_token_indices", [1, 5]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)  # fmt: skip
def test_what_changes_the_meaning_of_the_factors_is_refused(
    base: Path, field: str, value: object
) -> None:
    path = adapter(base.parent / "a", factors(Q), {field: value})
    says(refused(base, path), path, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", True), ("init_lora_weights", False),
        ("init_lora_weights", "gaussian"), ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "eva"), ("init_lora_weights", "mica"), ("lora_dropout", 0.1),
        ("task_type", "CAUSAL_LM"), ("runtime_config", {"ephemeral_gpu_offload": True}),
        ("megatron_core", "megatron.core"), ("qalora_group_size", 16), ("enable_lora", None),
        ("eva_config", {"rho": 2.0}), ("inference_mode", True), ("revision", "main"),
    ],
)  # fmt: skip
def test_what_leaves_the_meaning_of_the_factors_is_let_pass(
    base: Path, field: str, value: object
) -> None:
    path = adapter(base.parent / "a", factors(Q), {field: value})
    result = surgery("merge", base, path, "-o", base.parent / "out")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    "key",
    [
        f"{Q}.lora_magnitude_vector", f"{Q}.lora_magnitude_vector.weight", f"{Q}.lora_diag",
        "model.embed_tokens.token_adapter.trainable_tokens_delta", f"{Q}.hada_w1_a",
    ],
)  # fmt: skip
def test_parts_of_another_method_are_refused_though_the_config_hides_it(
    base: Path, key: str
) -> None:
    path = adapter(base.parent / "a", {**factors(Q), f"{PREFIX}{key}": array(OUT)})
    says(refused(base, path), f"{PREFIX}{key}", f"[{OUT}]")


def test_dora_without_its_magnitudes_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q), {"use_dora": True})
    says(refused(base, path), Q, "use_dora", "magnitudes are missing")


def test_magnitudes_of_another_number_than_rows_are_refused(base: Path) -> None:
    found = {**factors(Q), f"{PREFIX}{Q}.lora_magnitude_vector": array(OUT + 1)}
    path = adapter(base.parent / "a", found, {"use_dora": True})
    says(refused(base, path), Q, f"{OUT + 1} magnitudes", f"[{OUT}, ")


def test_dora_with_a_bias_of_b_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q), {"use_dora": True, "lora_bias": True})
    says(refused(base, path), path, "use_dora", "lora_bias")


def test_a_pattern_that_is_no_regular_expression_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q), {"rank_pattern": {"q_(proj": 3}})
    says(refused(base, path), "q_(proj")


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", "three"), ("lora_alpha", "much")])
def test_a_rank_or_alpha_that_is_no_number_is_refused(
    base: Path, field: str, value: object
) -> None:
    path = adapter(base.parent / "a", factors(Q), {field: value})
    says(refused(base, path), value)


def test_a_path_that_is_not_there_is_named(base: Path) -> None:
    says(refused(base, base.parent / "nowhere"), base.parent / "nowhere")


def test_a_directory_without_an_adapter_is_named(base: Path) -> None:
    (base.parent / "empty").mkdir()
    says(refused(base, base.parent / "empty"), base.parent / "empty")


def test_a_config_without_its_weights_is_named(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    (path / "adapter_model.safetensors").unlink()
    says(refused(base, path), path, "adapter_model.safetensors")


def test_a_config_that_is_no_json_is_named(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    (path / "adapter_config.json").write_text("{r: 3")
    says(refused(base, path), path / "adapter_config.json")


def test_a_truncated_file_is_named(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    says(refused(base, path), file)


def test_a_weight_that_is_no_number_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    says(refused(base, f"{path}:half"), f"{path}:half")


def test_two_adapters_that_replace_the_same_tensor_are_refused(base: Path) -> None:
    paths = []
    for times, name in enumerate(("a", "b"), 1):
        head = {f"{PREFIX}lm_head.weight": times * array(TOKENS, IN)}
        config = {"modules_to_save": ["lm_head"]}
        paths.append(adapter(base.parent / name, {**factors(Q), **head}, config))
    says(refused(base, *paths), "lm_head.weight", "two adapters")


def test_a_whole_tensor_cannot_be_weighed(base: Path) -> None:
    head = {f"{PREFIX}lm_head.weight": array(TOKENS, IN)}
    path = adapter(base.parent / "a", {**factors(Q), **head}, {"modules_to_save": ["lm_head"]})
    says(refused(base, f"{path}:0.5", code=2), path, "0.5", "lm_head.weight")


def test_an_output_that_exists_is_left_alone(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    (base.parent / "out").mkdir()
    (base.parent / "out/precious").write_text("mine")
    says(refused(base, path), base.parent / "out", "--overwrite")
    assert (base.parent / "out/precious").read_text() == "mine"


def test_the_base_is_never_written_into(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    before = (base / "model.safetensors").read_bytes()
    for out in (base, base / "merged", path):
        result = surgery("merge", base, path, "-o", out, "--overwrite")
        assert result.exit_code == 1, out
        assert str(out) in result.stderr
    assert (base / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in base.iterdir()) == ["config.json", "model.safetensors"]


def test_without_an_output_it_is_a_usage_error(base: Path) -> None:
    path = adapter(base.parent / "a", factors(Q))
    result = surgery("merge", base, path)
    assert result.exit_code == 2
    assert "--output" in result.stderr


def test_without_an_adapter_it_is_a_usage_error(base: Path) -> None:
    result = surgery("merge", base, "-o", base.parent / "out")
    assert result.exit_code == 2
    assert not (base.parent / "out").exists()
