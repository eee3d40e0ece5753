"""Adapter files that lack a factor, whose factors do not fit, or hold nan: one line each, and nothing written.

Over every variant that each dialect writes as safetensors; a new one is tested without an edit here.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import handmade
import numpy as np
import pytest
import small
import torch
from merge_files import refused
from merge_files import surgery as run
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig, Site

AT = "model.layers.0"
SIZES = {
    f"{AT}.self_attn.q_proj": (small.HIDDEN, small.HIDDEN),
    f"{AT}.mlp.up_proj": (small.WIDE, small.HIDDEN),
}
# what a file may lack: an alpha is the rank then, and without its magnitudes a DoRA is another's LoRA
OPTIONAL = (".alpha", ".dora_scale", ".lora_magnitude_vector")
# its factors are made elsewhere, or it is not merged
ELSEWHERE = {"peft_bridge", "vera", "moral", "delta_lora"}
WRITTEN = [
    (dialect, variant)
    for dialect in ("diffusers", "kohya", "peft", "surgery")
    for variant in plugins.load("dialects", dialect).VARIANTS
    if variant not in ELSEWHERE
]
EACH = pytest.mark.parametrize(
    ("dialect", "variant"), WRITTEN, ids=[f"{dialect}, {variant}" for dialect, variant in WRITTEN]
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return small.base(tmp_path / "base", torch.float32)


def made(folder: Path, dialect: str, variant: str) -> Path:
    """An adapter of two modules, whose factors are moved away from where they start."""
    rng = torch.Generator().manual_seed(0)
    module: Any = plugins.load("adapters", variant)
    config = AdapterConfig(variant, 4, 6.0)

    def site(path: str, out: int, in_: int) -> Site:
        fresh = module.init(torch.randn(out, in_, generator=rng), config, rng)
        noise = {n: f + 0.1 * torch.randn(f.shape, generator=rng) for n, f in fresh.items()}
        return handmade.site(
            path, config, {n: f.numpy() for n, f in noise.items()}, sides=(out, in_)
        )

    folder.mkdir()
    adapter = handmade.adapter([site(path, *size) for path, size in SIZES.items()])
    plugins.load("dialects", dialect).write(adapter, folder)
    return folder


def changed(whole: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an adapter, whose tensors are changed."""
    folder = shutil.copytree(whole, whole.parent / name)
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "np") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)
    return folder


def keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """The tensors of the module that is not square, and their shapes."""
    (file,) = folder.glob("*.safetensors")
    return {key: t.shape for key, t in sorted(load_file(file).items()) if "up_proj" in key}


@EACH
def test_what_is_right_is_merged(base: Path, dialect: str, variant: str) -> None:
    adapter = made(base.parent / "a", dialect, variant)
    done = run("merge", base, adapter, "-o", base.parent / "out")
    assert done.exit_code == 0, done.stderr


@EACH
def test_a_missing_factor_is_an_error(base: Path, dialect: str, variant: str) -> None:
    whole = made(base.parent / "whole", dialect, variant)
    shapes = keys(whole)
    for n, key in enumerate(shapes):
        may = dialect in ("kohya", "diffusers") and key.endswith(OPTIONAL)
        # of a module that has one factor nothing is left
        if may or len(shapes) == 1:
            continue
        adapter = changed(whole, f"less{n}", lambda tensors, key=key: tensors.pop(key))
        assert str(adapter) in refused(base, adapter), key


@EACH
def test_a_factor_of_another_size_is_an_error(base: Path, dialect: str, variant: str) -> None:
    whole = made(base.parent / "whole", dialect, variant)
    shapes = keys(whole)
    for n, (key, axis) in enumerate(
        (k, i) for k, shape in shapes.items() for i in range(len(shape))
    ):

        def cut(tensors: dict[str, Any], key: str = key, axis: int = axis) -> None:
            tensors[key] = np.ascontiguousarray(np.delete(tensors[key], 0, axis))

        assert refused(base, changed(whole, f"cut{n}", cut)), (key, axis)


@EACH
def test_a_factor_that_holds_nan_is_an_error(base: Path, dialect: str, variant: str) -> None:
    whole = made(base.parent / "whole", dialect, variant)
    for n, key in enumerate(keys(whole)):

        def spoil(tensors: dict[str, Any], key: str = key) -> None:
            tensors[key].reshape(-1)[0] = np.nan

        assert refused(base, changed(whole, f"nan{n}", spoil)), key


@EACH
def test_what_is_no_product_says_that_it_needs_the_base(
    base: Path, dialect: str, variant: str
) -> None:
    adapter = made(base.parent / "a", dialect, variant)
    done = run("convert", adapter, "-o", base.parent / "out", "--to", "lora", "--rank", 2, "-q")
    if done.exit_code:
        assert done.exit_code == 2
        assert done.stderr == (
            f"error: convert: {variant} to lora depends on the weights that are changed. Pass --base DIR.\n"
        )
    again = ("--base", base, "--dialect", "surgery", "-q")
    done = run("convert", adapter, "-o", base.parent / "with", "--to", "lora", "--rank", 2, *again)
    assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("dialect", ["peft", "surgery"])
def test_an_unknown_variant_is_an_error_that_names_it(base: Path, dialect: str) -> None:
    adapter = made(base.parent / "a", dialect, "lora")
    (file,) = adapter.glob("*.json")
    text = file.read_text().replace('"LORA"', '"LORAX"').replace('"lora"', '"lorax"')
    assert json.loads(text) != json.loads(file.read_text())
    file.write_text(text)
    assert "'lorax'" in refused(base, adapter).lower()


@pytest.mark.parametrize("dialect", ["gguf_lora", "ort_adapter"])
def test_nan_in_a_file_of_another_kind_is_an_error(base: Path, dialect: str) -> None:
    source = plugins.load("dialects", "peft").read(small.adapter(base.parent / "peft"))

    def spoilt(site: Site) -> Site:
        def load() -> dict[str, Any]:
            factors = dict(site.load())
            factors["A"].reshape(-1)[0] = np.nan
            return factors

        return replace(site, load=load)

    sites = (spoilt(source.sites[0]), *source.sites[1:])
    folder = base.parent / "a"
    folder.mkdir()
    held = replace(source, sites=sites, base_config=small.config())
    plugins.load("dialects", dialect).write(held, folder)
    assert "nan or inf" in refused(base, folder)
