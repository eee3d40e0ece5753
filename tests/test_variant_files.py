"""AdaLoRA and VeRA files that do not go together are refused, each in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_files import IN, OUT, PREFIX, Arrays, Q, V, adapter, array, make_base, refused, says

K = 2
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_modules": ["q_proj", "v_proj"]}
MASK = {"rank_pattern": {f"{Q}.lora_E": [True, False, True, False]}}
VERA = {
    "peft_type": "VERA", "r": 5, "target_modules": ["q_proj", "v_proj"], "lora_alpha": None,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def triplets(module: str, k: int = K) -> Arrays:
    shapes = {"A": (k, IN), "E": (k, 1), "B": (OUT, k)}
    return {f"{PREFIX}{module}.lora_{n}": array(*shape) for n, shape in shapes.items()}


def vectors(module: str, out: int = OUT) -> Arrays:
    at = f"{PREFIX}{module}.vera_lambda_"
    return {f"{at}b": array(out), f"{at}d": array(5)}


def shared(in_: int = IN, out: int = OUT) -> Arrays:
    return {"base_model.vera_A": array(5, in_), "base_model.vera_B": array(out, 5)}


def test_as_many_triplets_as_the_pattern_leaves_must_be_there(base: Path) -> None:
    path = adapter(base.parent / "a", triplets(Q, 3), {**ADALORA, **MASK})
    says(refused(base, path), Q, "lora_A [3, 12]", "rank 2")


def test_without_a_pattern_all_triplets_must_be_there(base: Path) -> None:
    path = adapter(base.parent / "a", triplets(Q), ADALORA)
    says(refused(base, path), Q, "lora_A [2, 12]", "rank 4")


def test_a_pattern_has_as_many_entries_as_there_were_triplets(base: Path) -> None:
    path = adapter(base.parent / "a", triplets(Q), {**ADALORA, **MASK, "init_r": 5})
    says(refused(base, path), f"{Q}: rank_pattern has 4 entries, but init_r is 5")


def test_a_pattern_of_numbers_is_refused(base: Path) -> None:
    config = {**ADALORA, "rank_pattern": {f"{Q}.lora_E": [1, 0]}}
    path = adapter(base.parent / "a", triplets(Q), config)
    says(refused(base, path), "adapter_config.json", f"'{Q}.lora_E'", "booleans")


def test_a_triplet_without_its_values_is_refused(base: Path) -> None:
    found = triplets(Q)
    del found[f"{PREFIX}{Q}.lora_E"]
    path = adapter(base.parent / "a", found, {**ADALORA, **MASK})
    says(refused(base, path), Q, f"lora_E of {Q} is missing")


def test_vera_without_projections_and_without_a_key_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", vectors(Q), VERA)
    says(refused(base, path), "vera_A and vera_B are missing, and no key is said")


def test_projections_narrower_than_a_module_are_refused(base: Path) -> None:
    path = adapter(base.parent / "a", {**vectors(Q), **shared(IN - 1)}, VERA)
    says(refused(base, path), Q, f"[{OUT}, {IN - 1}]", f"{Q}.weight", f"[{OUT}, {IN}]")


def test_projections_shorter_than_a_module_are_refused(base: Path) -> None:
    path = adapter(base.parent / "a", {**vectors(V), **shared(out=OUT - 1)}, VERA)
    says(refused(base, path), V, f"[{OUT - 1}, 5]", str(OUT))


def test_half_a_module_is_refused(base: Path) -> None:
    found = {**vectors(Q), **shared()}
    del found[f"{PREFIX}{Q}.vera_lambda_d"]
    path = adapter(base.parent / "a", found, VERA)
    says(refused(base, path), Q, f"vera_lambda_d of {Q} is missing")
