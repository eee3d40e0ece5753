"""prune by what changes do to outputs, against the inputs that PEFT's model gives its own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from merging import surgery
from safetensors.torch import load_file, save_file
from texts import TEXT, add_tokenizer, changes, facts, fails, inputs, output_error, save
from tiny import Base, make_base, tensors

WINDOW = 12
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
Inputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path := tmp_path_factory.mktemp("prune") / "text.txt").write_text(TEXT)
    return path.parent


@pytest.fixture(scope="module")
def base(home: Path) -> Base:
    return add_tokenizer(make_base("llama", home / "base"))


@pytest.fixture(scope="module")
def lora(home: Path, base: Base) -> Path:
    """Changes of very different sizes."""
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS)
    path = save(base, config, home / "lora")
    held = tensors(path)
    for i, name in enumerate(sorted(n for n in held if "lora_B" in n)):
        held[name] *= 1.5**-i
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def seen(base: Base, lora: Path) -> tuple[dict[str, np.ndarray], Inputs]:
    """Changes and inputs by module, as PEFT has them."""
    return changes(base, lora), inputs(base, lora, WINDOW)


@pytest.fixture
def line(home: Path, base: Base, lora: Path) -> tuple[object, ...]:
    text = home / "text.txt"
    return ("prune", lora, "--base", base.path, "--calibrate", text, "--window", WINDOW)


def test_ranks_go_where_they_change_outputs_most(line: Any, seen: Any, tmp_path: Path) -> None:
    out, budget = tmp_path / "out", 1200
    found = facts(*line, "-o", out, "--by", "activations", "--budget", budget)
    deltas, x = seen
    steps = []
    for name, delta in deltas.items():
        values = np.linalg.svd(delta @ x[name].T / len(x[name]) ** 0.5, compute_uv=False)
        steps += [(v**2 / sum(delta.shape), name, sum(delta.shape)) for v in values[:4]]
    ranks, left, stuck = dict.fromkeys(deltas, 0), budget, set()
    for _, name, cost in sorted(steps, reverse=True):
        if cost > left:
            stuck.add(name)
        if name not in stuck:
            ranks[name], left = ranks[name] + 1, left - cost
    assert {n: found["tensors"][f"{n}.weight"]["rank"] for n in deltas} == ranks
    # a budget that a ranking by the changes themselves would spend otherwise
    plain = facts("prune", line[1], "--dry-run", "--budget", budget)["tensors"]
    assert {n: plain[f"{n}.weight"]["rank"] for n in deltas} != ranks


def test_the_stated_error_is_that_of_the_outputs(
    line: Any, seen: Any, base: Base, tmp_path: Path
) -> None:
    found = facts(*line, "-o", tmp_path / "out", "--by", "activations", "--rank", 2)
    (deltas, x), after = seen, changes(base, tmp_path / "out")
    lost = whole = 0.0
    for name, delta in deltas.items():
        said = found["tensors"][f"{name}.weight"]
        error, norm = output_error(delta - after[name], x[name]), output_error(delta, x[name])
        # the smallest change is a fortieth of the largest, and float32 weights of 1 were added and taken away
        assert said["output_error"] == pytest.approx(error / norm, rel=2e-3)
        off = np.linalg.norm(delta - after[name]) / np.linalg.norm(delta)
        assert said["relative_error"] == pytest.approx(off, rel=2e-3)
        lost, whole = lost + error**2, whole + norm**2
    assert found["total"]["output_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert found["total"]["output_energy"] == pytest.approx(1 - lost / whole, rel=1e-3)


def test_a_share_of_outputs_is_kept_over_all_modules(line: Any) -> None:
    total = facts(*line, "--dry-run", "--by", "activations", "--energy", 0.9)["total"]
    assert 0.9 <= total["output_energy"] < 0.99


def groups(seen: Any) -> dict[str, dict[str, float]]:
    """g = E||D x||² of each module, by the last part of its name: numpy, from inputs that hooks have dumped."""
    deltas, x = seen
    found: dict[str, dict[str, float]] = {}
    for name, delta in deltas.items():
        kind = name.rpartition(".")[2]
        found.setdefault(kind, {})[name] = output_error(delta, x[name]) ** 2
    return found


def prefix(g: dict[str, float], share: float) -> set[str]:
    kept: set[str] = set()
    for name in sorted(g, key=lambda n: -g[n]):
        if sum(g[n] for n in kept) >= share * sum(g.values()):
            break
        kept.add(name)
    return kept


def kept(found: dict[str, Any]) -> set[str]:
    return {n.removesuffix(".weight") for n, t in found["tensors"].items() if t["kept"]}


@pytest.mark.parametrize("scope", ["group", "all"])
def test_the_fewest_modules_with_the_share_of_importance_are_kept(
    line: Any, seen: Any, scope: str
) -> None:
    of = list(groups(seen).values())
    if scope == "all":
        of = [{name: g for group in of for name, g in group.items()}]
    before: set[str] = set()
    for share in (0.5, 0.9, 1.0):
        found = facts(*line, "--dry-run", "--drop", share, "--drop-over", scope)
        for g in of:
            said = {n: found["tensors"][f"{n}.weight"]["importance"] for n in g}
            assert sum(said.values()) == pytest.approx(1)
            for name, value in g.items():
                assert said[name] == pytest.approx(value / sum(g.values()), rel=1e-3)
        assert kept(found) == set().union(*(prefix(g, share) for g in of))
        assert before <= kept(found)
        before = kept(found)
        assert found["total"]["kept_modules"] == len(before)
    assert before == seen[0].keys()


def test_the_others_share_a_pair_that_is_stored_once(
    line: Any, seen: Any, base: Base, tmp_path: Path
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    found = facts(*line, "-o", out, "--drop", 0.5, "--drop-over", "all")
    (deltas, _), stays = seen, kept(found)
    shared = {n for n in deltas if n not in stays}
    assert len({n for n in shared if n.endswith("q_proj")}) == 2
    stored = load_file(out / "adapter.safetensors")
    pairs = {n for n in stored if n.startswith("shared.")}
    assert {"shared.q_proj.32x32.A", "shared.q_proj.32x32.B"} <= pairs
    assert len(stored) == 2 * len(stays) + len(pairs)
    assert found["total"]["parameters"] == sum(t.numel() for t in stored.values())
    assert found["total"]["bytes"] == sum(t.nbytes for t in stored.values())
    result = surgery("merge", base.path, out, "-o", merged)
    assert result.exit_code == 0, result.stderr
    w, after = tensors(base.path), tensors(merged)
    for name, delta in deltas.items():
        got = (after[f"{name}.weight"].double() - w[f"{name}.weight"].double()).numpy()
        kind = name.rpartition(".")[2]
        mean = np.mean([d for n, d in deltas.items() if n in shared and n.endswith(kind)], axis=0)
        u, s, vt = np.linalg.svd(mean if name in shared else delta)
        wanted = (u[:, :4] * s[:4]) @ vt[:4]
        np.testing.assert_allclose(got, wanted, atol=1e-5)
        said = found["tensors"][f"{name}.weight"]["relative_error"]
        off = np.linalg.norm(delta - wanted) / np.linalg.norm(delta)
        assert said == pytest.approx(off, rel=1e-3, abs=1e-4)
    plain = facts("convert", out, "-o", tmp_path / "plain", "--dialect", "peft")
    assert plain["total"]["relative_error"] == 0
    again = changes(base, tmp_path / "plain")
    for name in deltas:
        got = (after[f"{name}.weight"].double() - w[f"{name}.weight"].double()).numpy()
        np.testing.assert_allclose(again[name], got, atol=1e-6)


def test_what_is_removed_is_gone_and_the_rest_is_what_it_was(
    line: Any, seen: Any, base: Base, lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    found = facts(*line, "-o", out, "--drop", 0.9, "--dropped", "remove")
    assert changes(base, out).keys() == kept(found) < seen[0].keys()
    was = tensors(lora)
    for name, t in tensors(out).items():
        assert torch.equal(t, was[name])
    for name, numbers in found["tensors"].items():
        gone = name.removesuffix(".weight") not in kept(found)
        assert numbers["relative_error"] == gone


def test_an_importance_grows_with_the_square_of_b(
    line: Any, lora: Path, base: Base, tmp_path: Path
) -> None:
    # nothing that is adapted comes after it, so that no input changes
    last = "model.layers.1.mlp.down_proj"
    before = facts(*line, "--dry-run", "--drop", 0.9)["tensors"]
    held = tensors(lora)
    held[f"base_model.model.{last}.lora_B.weight"] *= 3
    config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS)
    path = save(base, config, tmp_path / "scaled")
    save_file(held, path / "adapter_model.safetensors", {"format": "pt"})
    after = facts("prune", path, *line[2:], "--dry-run", "--drop", 0.9)["tensors"]
    for name, numbers in before.items():
        factor = 9 if name == f"{last}.weight" else 1
        assert after[name]["output2"] == pytest.approx(factor * numbers["output2"], rel=1e-6)


def test_errors_are_one_line_each(
    line: Any, base: Base, lora: Path, home: Path, tmp_path: Path
) -> None:
    text = home / "text.txt"
    plain = ("prune", lora, "--dry-run")
    assert fails(*plain, "--by", "activations", "--rank", 1) == (
        2, "error: --by activations: looks at inputs. Pass --calibrate TEXT and --base DIR.\n",
    )  # fmt: skip
    assert fails(*plain, "--drop", 0.9) == (
        2, "error: --drop: looks at inputs. Pass --calibrate TEXT and --base DIR.\n",
    )  # fmt: skip
    assert fails(*plain, "--drop", 0.9, "--calibrate", text) == (
        2, "error: --calibrate: runs the base on the text. Pass --base DIR.\n",
    )  # fmt: skip
    assert fails(*line, "--dry-run", "--rank", 1) == (
        2, "error: --calibrate: is for --by activations and --drop. Pass one of them.\n",
    )  # fmt: skip
    assert fails(*plain, "--by", "base", "--rank", 1) == (
        2, "error: --by base: counts by the base's weights. Pass --base DIR.\n",
    )  # fmt: skip
    assert fails(*line, "--dry-run", "--drop", 0.9, "--by", "activations") == (
        2, "error: --drop: keeps the ranks. Take --by and --ranks-allowed away.\n",
    )  # fmt: skip
    assert fails(*line, "--dry-run", "--drop", 1.5) == (
        1, "error: --drop 1.5: is no share. Pass more than 0 and at most 1.\n",
    )  # fmt: skip
    assert fails(*line, "--dry-run", "--drop", 0.9, "--rank", 2) == (
        2, "error: prune: needs one of --rank, --energy, --budget and --drop. Pass just one.\n",
    )  # fmt: skip
    untrained = tmp_path / "untrained"
    config = peft.LoraConfig(r=4, target_modules=TARGETS)
    peft.get_peft_model(base.load(), config).save_pretrained(untrained)
    assert fails("prune", untrained, *line[2:], "--dry-run", "--drop", 0.9) == (
        1,
        "error: --drop: none of the 10 changes does anything to an output on this text; is the adapter "
        "untrained? Train it for some steps first.\n",
    )
    vera = save(base, peft.VeraConfig(r=4, target_modules=["q_proj"]), tmp_path / "vera")
    assert fails("prune", vera, *line[2:], "--dry-run", "--drop", 0.9) == (
        2,
        "error: --drop: model.layers.0.self_attn.q_proj.weight is vera, which shares no factors. Pass --dropped "
        "remove, or convert it first: lorasurgery convert --to lora.\n",
    )
