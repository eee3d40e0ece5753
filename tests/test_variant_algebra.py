"""Laws of algebra, for every variant: converted and merged is merged, to the error that is stated; what pruning loses.

A new file in adapters/ is held to them, too.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import cli, facts
from safetensors.torch import load_file
from small import base
from test_variant_laws import HELD, MODULES, change, site, written

from lorasurgery import plugins
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter

# one layout each: what is computed is the variant's
FIRST = {variant: dialect for dialect, variant in reversed(HELD)}
EACH = pytest.mark.parametrize("variant", FIRST)
KINDS = pytest.mark.parametrize("kind", ["bfloat16", "nf4"])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return base(tmp_path / "plain")


def of_kind(plain: Path, kind: str) -> Path:
    if kind == "bfloat16":
        return plain
    assert cli("quantize", plain, "-o", plain.with_name("nf4"))[0] == 0
    return plain.with_name("nf4")


def changes(old: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What a merge in float32 adds, in float64."""
    out = adapter.with_name(f"{adapter.name}-merged")
    code, _, stderr = cli("merge", old, adapter, "-o", out, "--dtype", "float32")
    assert code == 0, stderr
    weights, merged = open_model(old).weights, load_file(out / "model.safetensors")
    names = [f"{module}.weight" for module in MODULES]
    return {
        n: merged[n].double() - torch.from_numpy(weights.read(n).astype(np.float64)) for n in names
    }


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    lost = sum(float((found[n] - w).square().sum()) for n, w in wanted.items())
    return (lost / sum(float(w.square().sum()) for w in wanted.values())) ** 0.5


@EACH
@KINDS
def test_converted_and_merged_is_merged_to_the_stated_error(
    plain: Path, tmp_path: Path, variant: str, kind: str
) -> None:
    old = of_kind(plain, kind)
    adapter = written(tmp_path / "adapter", FIRST[variant], variant, old)
    lora = tmp_path / "lora"
    flags = ("--base", old, "--dialect", "peft", "--rank", 3, "--exact")
    stated = facts("convert", adapter, "-o", lora, "--to", "lora", *flags)
    wanted, found = changes(old, adapter), changes(old, lora)
    assert stated["total"]["relative_error"] == pytest.approx(
        off(found, wanted), rel=2e-3, abs=1e-5
    )
    best = sum(
        float(np.square(np.linalg.svd(w.numpy(), compute_uv=False)[3:]).sum())
        for w in wanted.values()
    )
    whole = sum(float(w.square().sum()) for w in wanted.values())
    assert off(found, wanted) == pytest.approx((best / whole) ** 0.5, rel=2e-3, abs=1e-5)


@EACH
def test_what_pruning_loses_is_the_singular_values_that_it_leaves_out(
    plain: Path, tmp_path: Path, variant: str
) -> None:
    adapter = written(tmp_path / "adapter", FIRST[variant], variant, plain)
    sites = {module: site(variant, module, plain) for module in MODULES}
    code, _, stderr = cli("prune", adapter, "-o", tmp_path / "out", "--rank", 2)
    some = sites[MODULES[0]]
    if plugins.load("adapters", variant).low_rank(some.load(), some.config) is None:
        name = f"{open_adapter(adapter).sites[0].module}.weight"
        assert (code, stderr) == (
            1,
            f"error: {adapter}: {name} is {variant}, whose change is no product of small factors. Convert it "
            "first: lorasurgery convert --to lora.\n",
        )
        return
    stated = facts("prune", adapter, "--rank", 2, "--dry-run")["total"]["relative_error"]
    values = []
    for module, one in sites.items():
        w = torch.from_numpy(open_model(plain).weights.read(f"{module}.weight").astype(np.float32))
        values.append(np.linalg.svd(change(variant, one, w).double().numpy(), compute_uv=False))
    lost, whole = (sum(float((v[k:] ** 2).sum()) for v in values) for k in (2, 0))
    assert stated == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "kind"), [(("--dialect", "peft"), "LORA"), (("--to", "vera"), "VERA")]
)
def test_joined_names_become_those_of_the_base_that_is_given(
    plain: Path, tmp_path: Path, flags: tuple[str, ...], kind: str
) -> None:
    joined = written(tmp_path / "joined", "kohya", "lora", plain)
    assert all("." not in one.module for one in open_adapter(joined).sites)
    out = tmp_path / "out"
    stated = facts("convert", joined, "-o", out, *flags, "--rank", 24, "--base", plain)
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == kind
    assert {one.module for one in open_adapter(out).sites} == set(MODULES)
    error = off(changes(plain, out), changes(plain, joined))
    assert error == pytest.approx(stated["total"]["relative_error"], rel=2e-3, abs=1e-5)
    code, _, stderr = cli("convert", joined, "-o", tmp_path / "no", "--dialect", "peft")
    assert (code, stderr) == (
        1,
        f"error: {joined}: the names of its modules have _ for ., and PEFT needs them as the model has them. "
        "Give the base.\n",
    )
