"""Adapters of every kind beside a live model, unmerged: the outputs are PEFT's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import merge_cases
import neighbour_cases
import neighbours
import pytest
import test_variants_peft as variants
import torch
from merging import make_adapter, unmerged_by_peft
from tiny import Base, outputs

from lorasurgery.training.live import add_adapter

Bases = Callable[..., Base]
# float32 on both sides, summed in another order; an error of a weight grows in what comes after it
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# in tiny.TOKENS are none of the tokens that TRAINABLE_TOKENS trains there
NEIGHBOURS = [
    case
    for case in neighbour_cases.CASES
    if case.kind != "convolutions" and case.config.peft_type != "TRAINABLE_TOKENS"
]


def same(base: Base, adapter: Path) -> None:
    wanted = outputs(unmerged_by_peft(base, adapter))
    live = base.load()
    plain = outputs(live)
    layers = add_adapter(live, base.path, adapter)
    torch.testing.assert_close(outputs(live), wanted, **CLOSE)
    assert (wanted - plain).abs().max() > 1e-4  # or else there would be nothing to see
    assert all(layer.weight.dtype == torch.float32 for layer in layers.values())


@pytest.mark.parametrize("case", merge_cases.CASES, ids=lambda c: f"{c.kind}, {c.name}")
def test_lora_beside_a_model_computes_what_peft_computes(
    bases: Bases, tmp_path: Path, case: merge_cases.Case
) -> None:
    base = bases(case.kind)
    same(base, make_adapter(base, tmp_path / "adapter", **case.config))


@pytest.mark.parametrize("case", variants.CASES, ids=lambda c: f"{c.kind}, {c.name}")
def test_variants_beside_a_model_compute_what_peft_computes(
    bases: Bases, tmp_path: Path, case: variants.Case
) -> None:
    base = bases(case.kind)
    same(base, variants.make(base, case, tmp_path / "adapter"))


@pytest.mark.parametrize("case", NEIGHBOURS, ids=str)
def test_neighbours_of_lora_beside_a_model_compute_what_peft_computes(
    bases: Bases, tmp_path: Path, case: neighbours.Case
) -> None:
    base = bases(case.kind)
    same(base, neighbours.make(base, tmp_path / "adapter", case.config))
