"""Laws of files, for every variant in every dialect that holds it: a new file in adapters/ is held to them, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_unmerge import done, round_trip

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations._right_base import digest
from lorasurgery.tensors import TensorInfo
from tests import small

RANK, ALPHA = 4, 7.0  # OFT's blocks divide every side
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
# made for a whole model, not for modules one by one: held to the same laws where PEFT makes them
WHOLE = {"peft": ("vera", "peft_bridge")}
HELD = [
    (dialect, variant)
    for dialect in plugins.names("dialects")
    for variant in plugins.load("dialects", dialect).VARIANTS
    if variant not in WHOLE.get(dialect, ())
    if not hasattr(plugins.load("adapters", variant), "ROUTED")
]


def extra(variant: str, module: str, base: Path) -> dict[str, Any]:
    """What a config cannot do without."""
    bound = {"base": digest(open_model(base), f"{module}.weight"), "lambda": 0.5, "start": 100}
    return {
        "delta_lora": bound, "lora_drop": {"shared": module},
    }.get(variant, {})  # fmt: skip


def site(variant: str, module: str, base: Path) -> Site:
    """Fresh factors, moved by chance."""
    config = AdapterConfig(variant, RANK, ALPHA, extra=extra(variant, module, base))
    rng = torch.Generator().manual_seed(len(module))
    w = small.tensors(torch.float32)[f"{module}.weight"]
    fresh = plugins.load("adapters", variant).init(w, config, rng)
    factors = {
        n: (f + 0.05 * torch.randn(f.shape, generator=rng)).numpy() for n, f in fresh.items()
    }
    infos = {n: TensorInfo(f"{module}.{n}", "F32", f.shape) for n, f in factors.items()}
    sides = tuple(w.shape)
    return Site(module, "weight", "linear", config, infos, lambda: factors, sides=sides)


def written(folder: Path, dialect: str, variant: str, base: Path) -> Path:
    """An adapter of both modules: its directory, or its one file."""
    folder.mkdir()
    made = Adapter(
        folder,
        dialect,
        "made/by-hand",
        tuple(site(variant, module, base) for module in MODULES),
        {},
        {},
        dict.get,
        dict.get,
        base_config=small.config(),
    )
    plugins.load("dialects", dialect).write(made, folder)
    return next(iter(folder.iterdir())) if len(list(folder.iterdir())) == 1 else folder


def change(variant: str, site_: Site, w: torch.Tensor) -> torch.Tensor:
    """What the formula of training adds: x = 1 gives W' itself."""
    factors = {n: torch.from_numpy(np.array(f)) for n, f in site_.load().items()}
    run = plugins.load("adapters", variant).forward
    return run(torch.eye(w.shape[1]), w, factors, site_.config).T - w


@pytest.mark.parametrize(("dialect", "variant"), HELD, ids=lambda name: name)
@pytest.mark.parametrize("kind", ["bfloat16", "nf4"])
def test_written_read_merged_verified_and_undone(
    tmp_path: Path, dialect: str, variant: str, kind: str
) -> None:
    base = small.base(tmp_path / "plain")
    if kind == "nf4":
        done("quantize", base, "-o", tmp_path / "base")
        base = tmp_path / "base"
    sites = tuple(site(variant, module, base) for module in MODULES)
    path = written(tmp_path / "adapter", dialect, variant, base)
    read = open_adapter(path)
    assert {s.config.variant for s in read.sites} == {variant}
    round_trip(tmp_path, base, [path], "--dtype", "float32")
    weights = open_model(base).weights
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for one in sites:
        name = f"{one.module}.weight"
        w = torch.from_numpy(weights.read(name).astype(np.float32))
        wanted = change(variant, one, w)
        assert wanted.norm() > 1e-3 * w.norm()
        torch.testing.assert_close(merged[name] - w, wanted, atol=2e-5, rtol=1e-3)
    done("verify", tmp_path / "merged", "--base", base, "--adapter", path)


def test_every_variant_is_held_to_them_but_what_is_routed() -> None:
    held = {variant for _, variant in HELD}
    routed = {
        n for n in plugins.names("adapters") if hasattr(plugins.load("adapters", n), "ROUTED")
    }
    assert held | routed | set(WHOLE["peft"]) == set(plugins.names("adapters"))
