"""combine as typed: the changes add up, whatever their factors, ranks and targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from algebra import deltas, dense, facts, fails, write_lora
from small import adapter, tensors


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters with other ranks, scales, and only one module in common."""
    one = write_lora(tmp_path / "one", {"l.q": (20, 30, 3, 1.0), "l.k": (10, 12, 2, 1.0)})
    other = write_lora(
        tmp_path / "other",
        {"l.q": (20, 30, 5, 0.5), "l.v": (8, 9, 2, 1.0)},
        seed=1,
        use_rslora=True,
    )
    return one, other


def near(got: np.ndarray, wanted: np.ndarray) -> None:
    """Float32 factors of a few hundred products each."""
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


def test_linear_is_the_weighted_sum_of_the_changes(pair, tmp_path: Path) -> None:
    one, other = pair
    found = facts("combine", f"{one}:0.7", f"{other}:-0.4", "-o", tmp_path / "out")
    a, b, got = deltas(one), deltas(other), deltas(tmp_path / "out")
    assert got.keys() == {"l.q", "l.k", "l.v"}
    near(got["l.q"], 0.7 * a["l.q"] - 0.4 * b["l.q"])
    near(got["l.k"], 0.7 * a["l.k"])
    near(got["l.v"], -0.4 * b["l.v"])
    assert dense(tmp_path / "out")["l.q"][0].shape[0] == 8
    assert found["total"]["relative_error"] == 0


def test_one_adapter_alone_is_itself(pair, tmp_path: Path) -> None:
    one, _ = pair
    facts("combine", one, "-o", tmp_path / "out")
    for name, d in deltas(one).items():
        near(deltas(tmp_path / "out")[name], d)
    for name, (a, _, _) in dense(one).items():
        assert dense(tmp_path / "out")[name][0].shape == a.shape


def test_an_adapter_twice_has_no_higher_rank(pair, tmp_path: Path) -> None:
    one, _ = pair
    facts("combine", one, f"{one}:0.5", "-o", tmp_path / "out")
    near(deltas(tmp_path / "out")["l.q"], 1.5 * deltas(one)["l.q"])
    assert dense(tmp_path / "out")["l.q"][0].shape[0] == 3


def test_a_cut_rank_is_the_best_of_that_rank_and_its_error_is_stated(pair, tmp_path: Path) -> None:
    one, other = pair
    found = facts("combine", one, other, "-o", tmp_path / "out", "--rank", 4)
    wanted = deltas(one)["l.q"] + deltas(other)["l.q"]
    values = np.linalg.svd(wanted, compute_uv=False)
    best = np.sqrt((values[4:] ** 2).sum()) / np.linalg.norm(wanted)
    error = np.linalg.norm(deltas(tmp_path / "out")["l.q"] - wanted) / np.linalg.norm(wanted)
    assert error == pytest.approx(best, rel=1e-5)
    assert found["tensors"]["l.q.weight"]["relative_error"] == pytest.approx(best, rel=1e-5)


def elected(ds: list[np.ndarray], density: float) -> np.ndarray:
    """TIES, by its paper, one element at a time."""
    trimmed = []
    for d in ds:
        keep = np.sort(np.abs(d).ravel())[::-1][int(density * d.size) - 1]
        trimmed.append(np.where(np.abs(d) >= keep, d, 0))
    out = np.zeros(ds[0].shape)
    for at in np.ndindex(out.shape):
        values = [t[at] for t in trimmed]
        sign = 1 if sum(values) >= 0 else -1
        agree = [v for v in values if v * sign > 0]
        out[at] = np.mean(agree) if agree else 0
    return out


def test_ties_is_what_its_paper_says_with_the_error_of_its_truncation(pair, tmp_path: Path) -> None:
    one, other = pair
    args = ("combine", f"{one}:0.5", f"{other}:2", "--method", "ties", "--density", 0.3)
    facts(*args, "-o", tmp_path / "whole", "--rank", 30)
    wanted = elected([0.5 * deltas(one)["l.q"], 2 * deltas(other)["l.q"]], 0.3)
    near(deltas(tmp_path / "whole")["l.q"], wanted)
    found = facts(*args, "-o", tmp_path / "cut", "--rank", 4)
    values = np.linalg.svd(wanted, compute_uv=False)
    best = np.sqrt((values[4:] ** 2).sum()) / np.linalg.norm(wanted)
    assert found["tensors"]["l.q.weight"]["relative_error"] == pytest.approx(best, rel=1e-3)


def test_pruning_by_magnitude_keeps_the_largest(pair, tmp_path: Path) -> None:
    one, _ = pair
    facts(
        "combine", one, "--method", "magnitude_prune", "--density", 0.25, "--rank", 30,
        "-o", tmp_path / "out",
    )  # fmt: skip
    d = deltas(one)["l.q"]
    keep = np.sort(np.abs(d).ravel())[::-1][int(0.25 * d.size) - 1]
    near(deltas(tmp_path / "out")["l.q"], np.where(np.abs(d) >= keep, d, 0))


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_drops_by_chance_and_scales_up(tmp_path: Path, method: str) -> None:
    one = write_lora(tmp_path / "one", {"l.q": (40, 50, 3, 1.0)})
    args = ("combine", one, "--method", method, "--density", 0.5, "--rank", 40)
    facts(*args, "-o", tmp_path / "a")
    facts(*args, "-o", tmp_path / "b", "-j", 1)
    facts(*args, "-o", tmp_path / "c", "--seed", 1)
    d, got = deltas(one)["l.q"], [deltas(tmp_path / x)["l.q"] for x in "abc"]
    np.testing.assert_array_equal(got[0], got[1])
    assert not np.allclose(got[0], got[2])
    zero = np.abs(got[0]) < 1e-4 * np.abs(d).max()
    # 2000 chances of a half: six standard deviations are 0.067
    assert abs(zero.mean() - 0.5) < 0.07
    np.testing.assert_allclose(got[0][~zero], 2 * d[~zero], rtol=0, atol=1e-5 * np.abs(d).max())


def test_interference_is_measured_where_adapters_meet(tmp_path: Path) -> None:
    same = write_lora(tmp_path / "same", {"l.q": (20, 30, 3, 1.0)})
    other = write_lora(tmp_path / "other", {"l.q": (20, 30, 2, 1.0), "l.k": (5, 6, 1, 1.0)}, seed=3)
    twin = facts("combine", same, f"{same}:-2", "--dry-run")["tensors"]["l.q.weight"]
    # acos has no more than the root of float32's last bit near 1
    assert twin["angle_in"] == pytest.approx(0, abs=0.05)
    assert twin["angle_out"] == pytest.approx(0, abs=0.05)
    assert (twin["cosine"], twin["sign_conflict"]) == (pytest.approx(-1), 1)
    found = facts("combine", same, other, "--dry-run")
    assert "cosine" not in found["tensors"]["l.k.weight"]
    x, y = deltas(same)["l.q"], deltas(other)["l.q"]
    numbers = found["tensors"]["l.q.weight"]
    assert numbers["cosine"] == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert numbers["sign_conflict"] == (x * y < 0).mean()
    u, v = np.linalg.qr(dense(same)["l.q"][0].T)[0], np.linalg.qr(dense(other)["l.q"][0].T)[0]
    angle = np.degrees(np.arccos(np.linalg.svd(u.T @ v, compute_uv=False)[0]))
    assert numbers["angle_in"] == pytest.approx(angle, rel=1e-4)
    assert found["total"]["shared_modules"] == 1


def test_stacked_experts_add_up(tmp_path: Path) -> None:
    made = [
        write_lora(
            tmp_path / f"{i}",
            {"l.experts": (10, 14, 2 + i, 1.0)},
            experts=3,
            parameter="down_proj",
            seed=i,
        )
        for i in range(2)
    ]
    for method in ("linear", "magnitude_prune"):
        extra = () if method == "linear" else ("--density", 1)
        facts("combine", *made, "-o", tmp_path / method, "--method", method, *extra)
        wanted = deltas(made[0])["l.experts"] + deltas(made[1])["l.experts"]
        near(deltas(tmp_path / method)["l.experts"], wanted)


def test_errors(pair, tmp_path: Path) -> None:
    one, _ = pair
    other = write_lora(tmp_path / "third", {"l.q": (20, 31, 3, 1.0)})
    assert fails("combine", one, other, "--dry-run") == (
        1,
        f"l.q.weight: {one} changes [20, 30], but {other} [20, 31]. Combine adapters of one base.",
    )
    assert fails("combine", one, "--dry-run", "--density", 0.5) == (
        2, "--density: --method linear keeps all elements. Pass one of the two.",
    )  # fmt: skip
    assert fails("combine", one, "--dry-run", "--density", 2, "--method", "ties") == (
        1, "--density 2: is no share. Pass more than 0 and at most 1.",
    )  # fmt: skip


def test_whole_tensors_come_along_but_are_never_weighed_nor_mixed(tmp_path: Path) -> None:
    norm = "model.layers.0.input_layernorm"
    fields = {"whole": (f"{norm}.weight",), "modules_to_save": [norm]}
    one = adapter(tmp_path / "one", **fields)
    two = adapter(tmp_path / "two", seed=2, **fields)
    plain = adapter(tmp_path / "plain", seed=3)
    found = facts("combine", one, f"{plain}:0.5", "-o", tmp_path / "out")
    assert found["total"]["modules"] == 6
    assert f"{norm}.weight" in tensors()
    assert fails("combine", f"{one}:0.5", plain, "--dry-run") == (
        2,
        f"{one}: replaces {norm}.weight as a whole, which cannot be weighed by 0.5. Give it the weight 1.",
    )
    assert fails("combine", one, two, "--dry-run") == (
        1,
        f"{norm}.weight: {one} and {two} both replace it as a whole, by different values. Take it out "
        "of one of them.",
    )
    facts("combine", one, one, "--dry-run")
