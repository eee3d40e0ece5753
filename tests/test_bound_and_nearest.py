"""A LoRA as a variant that belongs to one base, and as the nearest of variants that hold less."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import cli, deltas, facts, fails
from safetensors.torch import load_file
from small import adapter, base

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import lokr, vera


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return base(tmp_path / "base", torch.float32)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return adapter(tmp_path / "lora", size=20)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_delta_lora_made_of_a_lora_merges_as_it_and_into_its_base_alone(
    old: Path, lora: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "delta", base(tmp_path / "other")
    found = facts("convert", lora, "-o", out, "--to", "delta_lora", "--base", old)
    assert found["total"]["exact_modules"] == found["total"]["modules"] == 6
    facts("merge", old, lora, "-o", tmp_path / "one")
    facts("merge", old, out, "-o", tmp_path / "two")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, atol=1e-7, rtol=1e-5)
    for command in (("merge", other, out), ("convert", out, "--base", other)):
        code, message = fails(*command, "-o", tmp_path / "x")
        assert code == 1
        assert message.startswith(f"{other}: model.layers.0.mlp.down_proj.weight has blake3:")
        assert message.endswith("Name the base that it was trained on.")


def test_a_delta_lora_is_a_lora_of_twice_its_rank(old: Path, lora: Path, tmp_path: Path) -> None:
    facts("convert", lora, "-o", tmp_path / "delta", "--to", "delta_lora", "--base", old)
    out = tmp_path / "out"
    found = facts("convert", tmp_path / "delta", "-o", out, "--dialect", "peft", "--base", old)
    assert found["total"]["relative_error"] == 0
    assert {m["rank"] for m in found["tensors"].values()} == {6}
    for name, d in deltas(lora).items():
        np.testing.assert_allclose(deltas(out)[name], d, atol=1e-5 * np.abs(d).max())


def test_a_delta_lora_needs_the_base(lora: Path, tmp_path: Path) -> None:
    assert fails("convert", lora, "-o", tmp_path / "out", "--to", "delta_lora") == (
        2, "convert: lora to delta_lora depends on the weights that are changed. Pass --base DIR.",
    )  # fmt: skip


def test_a_vera_has_projections_that_its_key_draws_again(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = facts("convert", lora, "-o", out, "--to", "vera", "--rank", 32, "--seed", 5)
    held = load_file(out / "adapter_model.safetensors")
    a, b = vera.projections(32, 160, 160, torch.Generator().manual_seed(5))
    assert torch.equal(held["base_model.vera_A"], a)
    assert torch.equal(held["base_model.vera_B"], b)
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["projection_prng_key"]) == (32, 5)
    # the change that the file makes, in float64, against the LoRA's
    off = whole = 0.0
    for name, d in deltas(lora).items():
        rows, cut = (held[f"base_model.model.{name}.vera_lambda_{v}"].double() for v in "bd")
        mine = rows[:, None] * (b[: len(rows)].double() * cut) @ a[:, : d.shape[1]].double()
        error = np.linalg.norm(mine.numpy() - d)
        stated = found["tensors"][f"{name}.weight"]["relative_error"]
        assert stated == pytest.approx(error / np.linalg.norm(d), rel=1e-4)
        off, whole = off + error**2, whole + np.linalg.norm(d) ** 2
    assert found["total"]["relative_error"] == pytest.approx((off / whole) ** 0.5, rel=1e-4)
    assert found["total"]["exact_modules"] == 0


def test_least_squares_leave_vera_no_better_b_and_no_better_d() -> None:
    rng = np.random.default_rng(0)
    w = d = rng.standard_normal((30, 20)).astype(np.float32)
    config = AdapterConfig("vera", 8, 8.0)
    made = vera.from_delta(w, d, (d[:8], d[:, :8]), config)
    best = np.linalg.norm(vera.delta(w, made, config) - d)
    assert best < np.linalg.norm(d)
    for name in "bd":
        for i in range(len(made[name])):
            for step in (0.99, 1.01):
                other = {**made, name: made[name].copy()}
                other[name][i] *= step
                assert np.linalg.norm(vera.delta(w, other, config) - d) > best * (1 - 1e-6)


def test_a_vera_whose_vectors_are_known_is_found_again() -> None:
    rng = np.random.default_rng(1)
    config = AdapterConfig("vera", 8, 8.0)
    w = rng.standard_normal((30, 20)).astype(np.float32)
    a, b = vera.projections(8, 20, 30, torch.Generator().manual_seed(0))
    vectors = {"b": rng.standard_normal(30), "d": rng.standard_normal(8)}
    known = {"A": a.numpy(), "B": b.numpy(), **{n: v.astype("f4") for n, v in vectors.items()}}
    d = vera.delta(w, known, config)
    made = vera.from_delta(w, d, (d[:8], d[:, :8]), config)
    np.testing.assert_allclose(vera.delta(w, made, config), d, atol=1e-3 * np.abs(d).max())


@pytest.mark.parametrize("factor", [-1, 4])
def test_the_nearest_kronecker_product_is_that_of_the_whole_svd(factor: int) -> None:
    rng = np.random.default_rng(0)
    d = rng.standard_normal((24, 32)).astype(np.float32)
    d[:8, :16] *= 3
    config = AdapterConfig("lokr", 8, 8.0, extra={"decompose_factor": factor})
    made = lokr.from_delta(d, d, (d[:8], d[:, :8]), config)
    assert {k: v.shape for k, v in made.items()} == lokr.shapes(24, 32, config)
    (a, b), (c, e) = made["W1"].shape, made["W2"].shape
    turned = d.reshape(a, c, b, e).transpose(0, 2, 1, 3).reshape(a * b, c * e)
    values = np.linalg.svd(turned.astype(np.float64), compute_uv=False)
    error = np.linalg.norm(lokr.delta(d, made, config) - d)
    assert error == pytest.approx(np.sqrt((values[1:] ** 2).sum()), rel=1e-4)


def test_a_lokr_of_two_factored_parts_is_found_again() -> None:
    rng = np.random.default_rng(2)
    config = AdapterConfig("lokr", 2, 2.0, extra={"decompose_both": True})
    shapes = lokr.shapes(36, 64, config)
    assert set(shapes) == {"W1A", "W1B", "W2A", "W2B"}
    known = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    d = lokr.delta(np.zeros((36, 64), np.float32), known, config)
    made = lokr.from_delta(d, d, (d[:2], d[:, :2]), config)
    np.testing.assert_allclose(lokr.delta(d, made, config), d, atol=1e-4 * np.abs(d).max())


def test_a_seed_of_nothing_is_refused(lora: Path, tmp_path: Path) -> None:
    assert fails("convert", lora, "-o", tmp_path / "out", "--to", "dora", "--seed", 1) == (
        2, "--to dora: has nothing that --seed draws. Take it away.",
    )  # fmt: skip
    assert cli("convert", "--explain")[0] == 0
