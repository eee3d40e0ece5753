"""inspect --spectrum: singular values of the changes, held to torch's SVD of the products themselves."""

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from tests import small

NAME = "model.layers.1.mlp.up_proj.weight"


def surgery(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def adapter(tmp_path):
    return small.adapter(tmp_path / "a", size=7)


def matrices(*arguments):
    result = surgery("inspect", *arguments, "--spectrum", "--json")
    assert result.exit_code == 0, result.stderr
    return {one["name"]: one for one in json.loads(result.stdout)["matrices"]}


def test_the_singular_values_are_those_of_the_product(adapter):
    found = matrices(adapter)[NAME]
    held = load_file(adapter / "adapter_model.safetensors")
    a, b = (
        held[f"base_model.model.{NAME.removesuffix('.weight')}.lora_{x}.weight"].double()
        for x in "AB"
    )
    wanted = torch.linalg.svdvals(b @ a * small.ALPHA / small.RANK)[: small.RANK]
    torch.testing.assert_close(
        torch.tensor(found["singular_values"]).double(), wanted, rtol=1e-5, atol=1e-9
    )
    assert found["rank"] == small.RANK
    shares = wanted / wanted.sum()
    entropy = -(shares * shares.log()).sum().item()
    assert found["effective_rank"] == pytest.approx(torch.tensor(entropy).exp().item(), rel=1e-4)
    assert found["relative"] is None


def test_with_a_base_the_size_of_each_change_is_told_beside_its_weight(adapter, tmp_path):
    base = small.base(tmp_path / "base")
    # `small.adapter` makes changes of so many percent
    for one in matrices(adapter, "--base", base).values():
        assert one["relative"] == pytest.approx(0.07, rel=1e-2)


def test_layers_are_folded_into_a_row_each(adapter):
    lines = surgery("inspect", adapter, "--spectrum").stdout.splitlines()
    assert lines[0].split()[:4] == ["matrix", "rank", "effective", "norm"]
    assert [line.split()[0] for line in lines[1:]] == [
        "model.layers.{0..1}.mlp.down_proj.weight",
        "model.layers.{0..1}.mlp.up_proj.weight",
        "model.layers.{0..1}.self_attn.q_proj.weight",
    ]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_picture_is_drawn(adapter, tmp_path, suffix):
    picture = tmp_path / f"spectrum.{suffix}"
    result = surgery("inspect", adapter, "--spectrum", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert picture.read_bytes().startswith(starts[suffix])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_merge_draws_what_it_kept(adapter, tmp_path):
    base, picture = small.base(tmp_path / "base"), tmp_path / "kept.png"
    result = surgery("merge", base, adapter, "-o", tmp_path / "out", "--plot", picture)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_picture_of_an_unknown_kind_is_refused_before_any_work(adapter, tmp_path):
    base = small.base(tmp_path / "base")
    result = surgery("merge", base, adapter, "-o", tmp_path / "out", "--plot", "kept.bmp")
    assert result.exit_code == 2
    assert result.stderr == "error: kept.bmp: a picture ends with .png, .svg, .pdf. Rename it.\n"
    assert not (tmp_path / "out").exists()


def test_what_goes_with_a_spectrum_is_refused_without_one(adapter):
    result = surgery("inspect", adapter, "--plot", "x.png")
    assert (result.exit_code, result.stderr) == (
        2,
        "error: --base and --plot: go with --spectrum. Add it.\n",
    )
