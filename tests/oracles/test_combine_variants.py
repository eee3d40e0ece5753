"""Adapters of unlike variants combined and compared, against the changes that PEFT's own merges make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from neighbours import make, merged_by_peft
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig
from texts import facts, fails
from tiny import Base

Bases = Callable[..., Base]
TARGETS = ["q_proj", "down_proj"]
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "loha": lambda: LoHaConfig(r=2, alpha=5, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=2, alpha=5, target_modules=TARGETS),
    "oft": lambda: OFTConfig(oft_block_size=4, r=0, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def two(bases: Bases, folder: Path, kind: str) -> tuple[Base, Path, Path]:
    base = bases("llama")
    lora = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    return base, make(base, folder / "lora", lora), make(base, folder / kind, KINDS[kind](), seed=2)


def changes(base: Base, path: Path) -> dict[str, np.ndarray]:
    """What PEFT's merge changes of any weight, float64 [out, in]."""
    before = dict(base.load().named_parameters())
    merged = dict(merged_by_peft(base, path).named_parameters())
    deltas = {n: (w.double() - before[n].double()).detach().numpy() for n, w in merged.items()}
    return {n.removesuffix(".weight"): d for n, d in deltas.items() if d.any()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_weighted_sum_is_that_of_pefts_merges(bases: Bases, tmp_path: Path, kind: str) -> None:
    base, lora, other = two(bases, tmp_path, kind)
    for first, second in (((lora, 0.5), (other, -1.5)), ((other, -1.5), (lora, 0.5))):
        out = tmp_path / f"first-{first[0].name}"
        found = facts(
            "combine", *(f"{path}:{weight}" for path, weight in (first, second)), "-o", out,
            "--rank", 48, "--base", base.path,
        )  # fmt: skip
        a, b, got = changes(base, lora), changes(base, other), changes(base, out)
        assert got.keys() == a.keys() | b.keys()
        for name, change in got.items():
            wanted = 0.5 * a.get(name, 0) - 1.5 * b.get(name, 0)
            np.testing.assert_allclose(change, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-6)
        assert found["total"]["relative_error"] < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_elements_of_unlike_variants_are_pruned_as_those_of_their_changes(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base, lora, other = two(bases, tmp_path, kind)
    facts(
        "combine", lora, other, "-o", tmp_path / "out", "--rank", 48, "--base", base.path,
        "--method", "magnitude_prune", "--density", 0.3,
    )  # fmt: skip
    name = "model.layers.0.self_attn.q_proj"
    wanted: Any = 0
    for change in (changes(base, path)[name] for path in (lora, other)):
        least = np.sort(np.abs(change).ravel())[::-1][int(0.3 * change.size) - 1]
        wanted = wanted + np.where(np.abs(change) >= least * (1 - 1e-6), change, 0)
    off = changes(base, tmp_path / "out")[name] - wanted
    # an element at the threshold may fall on the other side of it by a rounding
    assert (np.abs(off) > 1e-5).sum() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_difference_of_unlike_variants_is_that_of_their_changes(
    bases: Bases, tmp_path: Path, kind: str
) -> None:
    base, lora, other = two(bases, tmp_path, kind)
    found = facts("diff", lora, other, "--base", base.path)
    a, b = changes(base, lora), changes(base, other)
    both = a.keys() & b.keys()
    assert found["tensors"].keys() == {f"{name}.weight" for name in both}
    for name in both:
        said, x, y = found["tensors"][f"{name}.weight"], a[name], b[name]
        assert said["difference"] == pytest.approx(
            np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-4
        )
        cosine = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
        assert said["cosine"] == pytest.approx(cosine, abs=1e-4)


def test_what_decides_and_is_not_given_is_asked_for(bases: Bases, tmp_path: Path) -> None:
    _, lora, other = two(bases, tmp_path, "oft")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert fails("diff", lora, other) == (
        2,
        f"error: {other}: {name} is oft, whose change depends on the weight. Pass --base DIR.\n",
    )
    _, _, loha = two(bases, tmp_path / "more", "loha")
    facts("diff", lora, loha)  # is free of W
