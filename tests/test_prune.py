"""prune as typed: what is cut off is what is lost, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from algebra import deltas, dense, facts, fails, sizes, write_lora
from small import adapter as make_adapter
from small import base as make_base

BASE_NAMES = ("q_proj", "up_proj", "down_proj")


def spectra(path: Path) -> dict[str, np.ndarray]:
    """Singular values of each module's change, from the dense change, float64."""
    return {name: np.linalg.svd(d, compute_uv=False) for name, d in deltas(path).items()}


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """Ranks that differ, and modules of very different sizes."""
    return write_lora(
        tmp_path / "lora",
        {"l.0.q": (20, 30, 4, 1.0), "l.0.k": (20, 30, 6, 0.1), "l.1.q": (50, 12, 4, 3.0)},
    )


def test_the_error_is_the_discarded_singular_values(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = facts("prune", lora, "-o", out, "--energy", "0.8")
    before, after, values = deltas(lora), deltas(out), spectra(lora)
    for name, numbers in found["tensors"].items():
        module = name.removesuffix(".weight")
        rank = int(numbers["rank"])
        got = after.get(module, np.zeros_like(before[module]))
        error = np.linalg.norm(before[module] - got)
        # float32 factors
        assert error == pytest.approx(
            np.sqrt((values[module][rank:] ** 2).sum()), rel=1e-5, abs=1e-5
        )
        assert numbers["relative_error"] == pytest.approx(
            error / np.linalg.norm(before[module]), rel=1e-5, abs=1e-6
        )
        assert numbers["rank_before"] == len(values[module][values[module] > 1e-4])


def test_energy_is_kept_over_all_modules_with_the_fewest_parameters(
    lora: Path, tmp_path: Path
) -> None:
    found = facts("prune", lora, "-o", tmp_path / "out", "--energy", "0.8")
    values = spectra(lora)
    cost = {"l.0.q": 50, "l.0.k": 50, "l.1.q": 62}
    steps = sorted(
        ((v**2 / cost[n], v**2, n) for n, s in values.items() for v in s if v > 1e-4), reverse=True
    )
    whole, held, ranks = sum(e for _, e, _ in steps), 0.0, dict.fromkeys(values, 0)
    for _, energy, name in steps:
        if held >= 0.8 * whole:
            break
        held, ranks[name] = held + energy, ranks[name] + 1
    assert {n: found["tensors"][f"{n}.weight"]["rank"] for n in values} == ranks
    assert found["total"]["energy"] == pytest.approx(held / whole, rel=1e-6)


def test_a_budget_is_not_exceeded_and_spent_as_far_as_a_rank_fits(
    lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = facts("prune", lora, "-o", out, "--budget", "300")
    written = sum(a.size + b.size for a, b, _ in dense(out).values())
    assert found["total"]["parameters"] == written
    # one more rank of the smallest module would not fit
    assert 300 - 50 < written <= 300


def test_a_budget_in_bytes_counts_the_dtype_that_is_written(lora: Path, tmp_path: Path) -> None:
    wide = facts("prune", lora, "-o", tmp_path / "a", "--budget", "1200B")
    narrow = facts("prune", lora, "-o", tmp_path / "b", "--budget", "1200B", "--dtype", "bfloat16")
    assert 1000 < wide["total"]["bytes"] <= 1200
    assert 1000 < narrow["total"]["bytes"] <= 1200
    assert narrow["total"]["parameters"] > 1.5 * wide["total"]["parameters"]
    assert sizes(tmp_path / "b") == {"BF16"}


def test_a_module_without_a_rank_is_left_out(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = facts("prune", lora, "-o", out, "--budget", "130")
    ranks = {n.removesuffix(".weight"): r["rank"] for n, r in found["tensors"].items()}
    assert 0 in ranks.values()
    assert set(dense(out)) == {name for name, rank in ranks.items() if rank}
    assert found["total"]["dropped"] == list(ranks.values()).count(0)


def test_relative_to_the_base_a_small_weights_change_counts_more(tmp_path: Path) -> None:
    base, lora = make_base(tmp_path / "base"), make_adapter(tmp_path / "lora", BASE_NAMES)
    plain = facts("prune", lora, "--dry-run", "--budget", "2000")
    relative = facts("prune", lora, "--dry-run", "--budget", "2000", "--base", base)

    def share(found: dict[str, Any], module: str) -> float:
        return sum(t["rank"] for n, t in found["tensors"].items() if module in n)

    # q_proj is the smallest weight, and each change is a hundredth of its own weight
    assert share(relative, "q_proj") > share(plain, "q_proj")
    assert plain["output"] is None


def test_ranks_are_padded_up_to_what_is_allowed(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    facts("prune", lora, "-o", out, "--rank", "8", "--ranks-allowed", "8,16")
    assert {a.shape[0] for a, _, _ in dense(out).values()} == {8}
    for name, d in deltas(lora).items():
        np.testing.assert_allclose(deltas(out)[name], d, rtol=0, atol=1e-5 * np.abs(d).max())


def test_the_full_rank_is_the_adapter_itself(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = facts("prune", lora, "-o", out, "--rank", "64")
    assert found["total"]["relative_error"] == 0
    for name, d in deltas(lora).items():
        np.testing.assert_allclose(deltas(out)[name], d, rtol=0, atol=1e-5 * np.abs(d).max())
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {"^l.0.k": 6})
    assert (config["lora_alpha"], config["alpha_pattern"]) == (4, {"^l.0.k": 6})


def test_stacked_experts_share_their_rank(tmp_path: Path) -> None:
    lora = write_lora(
        tmp_path / "lora", {"l.0.experts": (10, 14, 3, 1.0)}, experts=4, parameter="down_proj"
    )
    found = facts("prune", lora, "-o", tmp_path / "out", "--rank", "2")
    before, after = deltas(lora)["l.0.experts"], deltas(tmp_path / "out")["l.0.experts"]
    values = np.linalg.svd(before, compute_uv=False)
    error = np.sqrt((values[:, 2:] ** 2).sum() / (values**2).sum())
    [numbers] = found["tensors"].values()
    assert numbers["relative_error"] == pytest.approx(error, rel=1e-5)
    assert np.linalg.norm(before - after) / np.linalg.norm(before) == pytest.approx(error, rel=1e-5)


def test_surgery_json_says_what_was_done(lora: Path, tmp_path: Path) -> None:
    facts("prune", lora, "-o", tmp_path / "out", "--rank", "2")
    said = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert (said["operation"], said["base"]) == ("prune", "made/by-hand")
    assert said["inputs"] == {"adapter": str(lora)}
    assert said["settings"]["rank"] == 2
    assert said["digests"]["adapter"].startswith("blake3:")
    assert said["base_fingerprint"] is None
    assert said["tensors"]["l.0.q.weight"]["metrics"]["rank"] == 2
    files = {f.name for f in (tmp_path / "out").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "surgery.json"}
    assert not (tmp_path / "out.partial").exists()


def test_errors_are_one_line_each_and_leave_nothing(lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one = "prune: needs one of --rank, --energy, --budget and --drop. Pass just one."
    assert fails("prune", lora, "-o", out) == (2, one)
    assert fails("prune", lora, "-o", out, "--rank", "2", "--energy", "0.5") == (2, one)
    assert fails("prune", lora, "-o", out, "--rank", "0") == (
        1, "--rank 0: is no rank. Pass 1 or more.",
    )  # fmt: skip
    assert fails("prune", lora, "-o", out, "--energy", "1.5") == (
        1, "--energy 1.5: is no share. Pass more than 0 and at most 1.",
    )  # fmt: skip
    assert fails("prune", lora, "-o", out, "--budget", "some") == (
        1, "'some' is no number of parameters and no size. Write it as 2.5M or 40MiB.",
    )  # fmt: skip
    assert fails("prune", lora, "-o", out, "--rank", "4", "--ranks-allowed", "8,16") == (
        1, "--rank 4: is below every rank of --ranks-allowed (8, 16). Raise it.",
    )  # fmt: skip
    assert fails("prune", lora, "-o", out, "--budget", "10") == (
        1, f"{lora}: nothing is left of it to write. Ask for less to go.",
    )  # fmt: skip
    assert fails("prune", lora, "-o", lora, "--rank", "2") == (
        1, f"{lora}: is or holds the input {lora}. Name another output.",
    )  # fmt: skip
    out.mkdir()
    (out / "mine").write_text("mine")
    assert fails("prune", lora, "-o", out, "--rank", "2") == (
        1, f"{out}: exists and is not empty. Pass --overwrite, or name another.",
    )  # fmt: skip
    assert (out / "mine").read_text() == "mine"
    facts("prune", lora, "-o", out, "--rank", "2", "--overwrite")
    assert not (out / "mine").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora", "out"]


def test_a_factor_with_nan_is_refused(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {"l.0.q": (6, 5, 2, float("nan"))})
    assert fails("prune", lora, "--dry-run", "--rank", "1") == (
        1,
        f"{lora}: the change of l.0.q.weight is nan or infinite. Look for it in its factors.",
    )
