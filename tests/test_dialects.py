"""Laws that hold for every dialect: what is written is read again, and nobody else's files are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from handmade import HIDDEN, WIDE, adapter, delta, llama, lora
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig
from lorasurgery.cli.app import app
from lorasurgery.dialects import peft
from lorasurgery.operations._adapters import open_adapter

# a scale baked into B rounds each of at most 4 products of at most 8, which may then cancel
CLOSE = {"rtol": 1e-6, "atol": 2e-6}
NAMES = plugins.names("dialects")


@pytest.fixture(params=NAMES)
def dialect(request):
    return plugins.load("dialects", request.param)


def written(dialect, made: Adapter, folder: Path) -> Path:
    folder.mkdir()
    dialect.write(made, folder)
    return folder


def modules(found: Adapter) -> dict[str, object]:
    """Sites by module, without what distinguishes kohya's joined names from paths."""
    return {site.module.replace(".", "_"): site for site in found.sites}


def test_what_is_written_is_read_again(dialect, tmp_path):
    made = llama()
    found = dialect.read(written(dialect, made, tmp_path / "it"))
    assert found.problems == ()
    wanted, got = modules(made), modules(found)
    assert got.keys() == wanted.keys()
    for name, site in wanted.items():
        assert got[name].config.variant == "lora"
        assert got[name].config.rank == site.config.rank
        assert {n: i.shape for n, i in got[name].factors.items()} == {
            n: f.shape for n, f in got[name].load().items()
        }
        np.testing.assert_allclose(delta(got[name]), delta(site), **CLOSE)


def test_a_single_file_is_the_adapter_too(dialect, tmp_path):
    folder = written(dialect, llama(), tmp_path / "it")
    files = sorted(folder.iterdir())
    if len(files) == 1:
        assert dialect.detect(files[0])
        assert modules(dialect.read(files[0])).keys() == modules(llama()).keys()
    else:
        config, weights = (file.suffix for file in files)
        assert (config, weights) == (".json", ".safetensors")


def test_each_dialect_knows_its_own_files_and_no_others(dialect, tmp_path):
    folder = written(dialect, llama(), tmp_path / "it")
    claims = [n for n in NAMES if plugins.load("dialects", n).detect(folder)]
    assert [f"lorasurgery.dialects.{name}" for name in claims] == [dialect.__name__]
    assert open_adapter(folder).dialect == claims[0]


def test_no_dialect_takes_a_model_for_an_adapter(dialect, tmp_path):
    save_file(
        {"model.embed_tokens.weight": np.ones((4, 4), np.float32)}, tmp_path / "x.safetensors"
    )
    (tmp_path / "config.json").write_text("{}")
    assert not dialect.detect(tmp_path)
    assert not dialect.detect(tmp_path / "x.safetensors")
    assert not dialect.detect(tmp_path / "missing")


def test_written_twice_is_written_the_same(dialect, tmp_path):
    one, two = (written(dialect, llama(), tmp_path / name) for name in "ab")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes(), file.name


def test_read_and_written_again_is_the_same_change(dialect, tmp_path):
    first = dialect.read(written(dialect, llama(), tmp_path / "a"))
    again = replace(first, base_config=llama().base_config)
    second = dialect.read(written(dialect, again, tmp_path / "b"))
    for one, two in zip(first.sites, second.sites, strict=True):
        assert one.module == two.module
        np.testing.assert_allclose(delta(one), delta(two), **CLOSE)


def test_a_scale_by_the_root_of_the_rank_is_kept(dialect, tmp_path):
    config = AdapterConfig("lora", 4, 8.0, rank_stabilized=True)
    made = adapter([lora("model.layers.0.mlp.up_proj", WIDE, HIDDEN, config)])
    (site,) = dialect.read(written(dialect, made, tmp_path / "it")).sites
    np.testing.assert_allclose(delta(site), delta(made.sites[0]), **CLOSE)


def test_it_merges_like_the_same_adapter_of_peft(dialect, tmp_path):
    base = small.base(tmp_path / "base", torch.float32)
    source = peft.read(small.adapter(tmp_path / "peft"))
    written(dialect, replace(source, base_config=small.config()), tmp_path / "it")
    for name in ("peft", "it"):
        output = tmp_path / f"by-{name}"
        done = CliRunner().invoke(
            app, ["merge", str(base), str(tmp_path / name), "-o", str(output), "-q"]
        )
        assert done.exit_code == 0, done.output
    before = load_file(base / "model.safetensors")
    wanted, found = (load_file(tmp_path / f"by-{n}" / "model.safetensors") for n in ("peft", "it"))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # the order of products differs, and a scale in B rounds once more: 1e-6 of a change of 1 %
        change = np.abs(tensor - before[name]).max()
        np.testing.assert_allclose(found[name], tensor, rtol=3e-7, atol=1e-5 * change)
        if name.endswith(("q_proj.weight", "up_proj.weight", "down_proj.weight")):
            assert change > 1e-4


# our own layout is float32, as it says
@pytest.mark.parametrize("dialect", [n for n in NAMES if n != "surgery"], indirect=True)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_sixteen_bits_are_written_where_they_are_asked_for(dialect, dtype, tmp_path):
    made = llama()
    halves = [
        replace(s, factors={n: replace(i, dtype=dtype) for n, i in s.factors.items()})
        for s in made.sites
    ]
    small_one = written(dialect, replace(made, sites=tuple(halves)), tmp_path / "half")
    large = written(dialect, made, tmp_path / "whole")
    sizes = [sum(f.stat().st_size for f in folder.iterdir()) for folder in (small_one, large)]
    # onnxruntime's parameters come from numpy, which has no bfloat16
    if (dialect.__name__.rpartition(".")[2], dtype) != ("ort_adapter", "BF16"):
        assert sizes[0] < 0.8 * sizes[1]
    for name, site in modules(dialect.read(small_one)).items():
        wanted = next(s for s in made.sites if s.module.replace(".", "_") == name)
        # sixteenths are exact in 8 bits; a scale baked into B may not be, of at most 4 products of 8
        np.testing.assert_allclose(delta(site), delta(wanted), rtol=2**-8, atol=32 * 2**-8)
