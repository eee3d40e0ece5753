"""Our own adapter layout: what is written is read again, merged, undone and verified, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.cli.app import app
from lorasurgery.dialects import peft, surgery
from lorasurgery.errors import FormatError
from lorasurgery.model import open_model
from lorasurgery.operations._right_base import digest
from lorasurgery.tensors import TensorInfo
from tests import small

RANK, ALPHA = 3, 7.0
MODULES = (
    "model.layers.0.mlp.up_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.1.mlp.up_proj",
)


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def site(module: str, variant: str, seed: int = 0, **extra: object) -> Site:
    """Random factors of 1 % of the weight or so, and those that begin at 1 near 1."""
    plugin, config = (
        plugins.load("adapters", variant),
        AdapterConfig(variant, RANK, ALPHA, extra=extra),
    )
    rng = torch.Generator().manual_seed(seed)
    w = small.tensors()[f"{module}.weight"].float()
    fresh = plugin.init(w, config, rng)
    factors = {
        n: (f + 0.02 * torch.randn(f.shape, generator=rng)).numpy() for n, f in fresh.items()
    }
    infos = {n: TensorInfo(f"{module}.{n}", "F32", f.shape) for n, f in factors.items()}
    return Site(module, "weight", "linear", config, infos, lambda: factors)


def save(folder: Path, *sites: Site) -> Path:
    folder.mkdir()
    nothing = Adapter(folder, "surgery", "made/by-hand", sites, {}, {}, dict.get, dict.get)
    surgery.write(nothing, folder)
    return folder


def sites_of(variant: str, base: Path) -> list[Site]:
    if variant == "lora_drop":
        extras = [{"shared": "up"}, {}, {"shared": "up"}]
        return [
            site(m, variant, i % 2, **x)
            for i, (m, x) in enumerate(zip(MODULES, extras, strict=True))
        ]
    if variant == "delta_lora":
        model = open_model(base)
        said = {"lambda": 0.5, "start": 100}
        return [site(m, variant, **said, base=digest(model, f"{m}.weight")) for m in MODULES]
    return [site(m, variant) for m in MODULES]


MERGED = [v for v in surgery.VARIANTS if v != "moral"]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def base(request, tmp_path):
    return small.base(tmp_path / "base", request.param)


@pytest.mark.parametrize("variant", MERGED)
def test_what_is_written_is_read_merged_verified_and_undone(variant, base, tmp_path):
    sites = sites_of(variant, base)
    path = save(tmp_path / "a", *sites)
    read = surgery.read(path)
    assert [replace(s, load=None) for s in read.sites] == [
        replace(s, load=None, factors=r.factors) for s, r in zip(sites, read.sites, strict=True)
    ]
    for ours, theirs in zip(read.sites, sites, strict=True):
        for name, factor in theirs.load().items():
            np.testing.assert_array_equal(ours.load()[name], factor)
    merged, undo = tmp_path / "merged", tmp_path / "undo"
    done("merge", base, path, "-o", merged, "--undo", undo)
    before, after = (load_file(f / "model.safetensors") for f in (base, merged))
    for s in sites:
        # the training formula, on torch: x = 1 gives W' itself
        w = before[f"{s.module}.weight"].float()
        factors = {n: torch.from_numpy(f) for n, f in s.load().items()}
        plugin = plugins.load("adapters", variant)
        wanted = plugin.forward(torch.eye(w.shape[1]), w, factors, s.config).T
        got = after[f"{s.module}.weight"]
        assert (wanted - w).norm() > 1e-4 * w.norm()
        torch.testing.assert_close(got, wanted.to(got.dtype), atol=1e-6, rtol=2**-7)
    done("verify", merged, "--base", base, "--adapter", path)
    done("unmerge", merged, path, "-o", tmp_path / "back", "--undo", undo)
    name = "model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes()


def test_a_shared_pair_is_stored_once(tmp_path):
    base = small.base(tmp_path / "base")
    path = save(tmp_path / "a", *sites_of("lora_drop", base))
    own = f"{MODULES[1]}.weight"
    assert set(load_file(path / surgery.WEIGHTS)) == {
        "shared.up.A", "shared.up.B", f"{own}.A", f"{own}.B",
    }  # fmt: skip


def test_a_pair_that_is_not_the_same_cannot_be_shared(tmp_path):
    sites = [site(m, "lora_drop", i, shared="up") for i, m in enumerate(MODULES[::2])]
    with pytest.raises(
        FormatError, match=f": {MODULES[2]} shares shared.up.A, but its own differs"
    ):
        save(tmp_path / "a", *sites)


def test_a_delta_lora_is_refused_on_another_base(tmp_path):
    base = small.base(tmp_path / "base")
    path = save(tmp_path / "a", *sites_of("delta_lora", base))
    other = small.base(tmp_path / "other", torch.float32)
    result = run("merge", other, path, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    name = f"{MODULES[0]}.weight"
    assert f"error: {other}: {name} has blake3:" in result.stderr
    assert "Name the base that it was trained on." in result.stderr
    assert not (tmp_path / "merged").exists()
    done("merge", base, path, "-o", tmp_path / "merged")
    assert run("verify", tmp_path / "merged", "--base", other, "--adapter", path).exit_code == 1


def test_a_delta_lora_without_its_base_is_not_written(tmp_path):
    with pytest.raises(FormatError, match="is a Delta-LoRA without the hash of its base"):
        save(tmp_path / "a", site(MODULES[0], "delta_lora"))


def test_a_delta_lora_comes_out_again_without_an_undo_file(tmp_path):
    base = small.base(tmp_path / "base", torch.float32)
    path = save(tmp_path / "a", *sites_of("delta_lora", base))
    done("merge", base, path, "-o", tmp_path / "merged")
    done("unmerge", tmp_path / "merged", path, "-o", tmp_path / "back")
    back, wanted = (load_file(tmp_path / d / "model.safetensors") for d in ("back", "base"))
    for name, w in wanted.items():
        torch.testing.assert_close(back[name], w, atol=1e-7, rtol=1e-6)


def test_moral_is_not_merged(tmp_path):
    base = small.base(tmp_path / "base")
    path = save(tmp_path / "a", site(MODULES[0], "moral", experts=4, top_k=2))
    assert surgery.read(path).problems == ()
    result = run("merge", base, path, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        f"error: {path}: {MODULES[0]}: a router chooses among its experts for each token, so no merged "
        "weight does the same; convert it first, with --mixture mean, top or experts."
    )


def test_row_scales_are_a_dora_exactly(tmp_path):
    base = small.base(tmp_path / "base", torch.float32)
    doras = [site(m, "dora", i) for i, m in enumerate(MODULES)]
    scaled = []
    for s in doras:
        w = small.tensors(torch.float32)[f"{s.module}.weight"].numpy()
        made = plugins.load("adapters", "lora_rowscale").from_dora(w, s.load(), s.config)
        infos = {n: TensorInfo(n, "F32", f.shape) for n, f in made.items()}
        config = replace(s.config, variant="lora_rowscale")
        scaled.append(replace(s, config=config, factors=infos, load=lambda made=made: made))
    (tmp_path / "d").mkdir()
    peft.write(
        replace(surgery.read(save(tmp_path / "a", *doras)), sites=tuple(doras)), tmp_path / "d"
    )
    done("merge", base, tmp_path / "d", "-o", tmp_path / "one")
    done("merge", base, save(tmp_path / "g", *scaled), "-o", tmp_path / "two")
    one, two = (load_file(tmp_path / d / "model.safetensors") for d in ("one", "two"))
    assert set(one) == set(two)
    weights = small.tensors(torch.float32)
    assert not torch.equal(one[f"{MODULES[0]}.weight"], weights[f"{MODULES[0]}.weight"])
    for name, w in one.items():
        torch.testing.assert_close(two[name], w, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "version 2, but 1 is read here. Take a newer lorasurgery."),
        ({"sites": 0, "rank": "3"}, "a site's rank is '3', which is not understood. Mend it."),
        ({"sites": 0, "factors": {"A": "gone"}}, "A is 'gone', which adapter.safetensors does not have"),
        ({"sites": 0, "rank": 4}, "but a lora of this config has"),
        ({"sites": []}, "is a tensor that adapter.json does not name"),
    ],
    ids=["version", "field", "key", "rank", "left over"],
)  # fmt: skip
def test_a_wrong_description_is_refused(change, words, tmp_path):
    base = small.base(tmp_path / "base")
    path = save(tmp_path / "a", site(MODULES[0], "lora"))
    config = json.loads((path / "adapter.json").read_text())
    if change.get("sites") == 0:
        config["sites"][0] |= {k: v for k, v in change.items() if k != "sites"}
    else:
        config |= change
    (path / "adapter.json").write_text(json.dumps(config))
    result = run("merge", base, path, "-o", tmp_path / "merged")
    assert result.exit_code == 1
    assert words in result.stderr
