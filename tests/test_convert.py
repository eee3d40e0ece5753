"""convert as typed: the same change in another form, or the nearest one, with its error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import cli, deltas, dense, facts, fails, write_lora
from safetensors.torch import load_file, save_file
from small import adapter, base, tensors

from lorasurgery import plugins
from lorasurgery.model import open_model
from lorasurgery.operations.algebra.site_weights import SiteWeights

PEFT = plugins.load("dialects", "peft").VARIANTS


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return base(tmp_path / "base", torch.float32)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A change of a fifth of each weight, so that what a DoRA's norms do to it counts."""
    return adapter(tmp_path / "lora", size=20)


def merged(old: Path, path: Path) -> dict[str, torch.Tensor]:
    out = path.with_name(f"{path.name}-merged")
    code, _, stderr = cli("merge", old, path, "-o", out, "--dtype", "float32", "--overwrite")
    assert code == 0, stderr
    return load_file(out / "model.safetensors")


def error(old: Path, one: Path, other: Path) -> float:
    """||D1 - D2|| / ||D2|| over all weights, as merge makes them."""
    weights, a, b = open_model(old).weights, merged(old, one), merged(old, other)
    assert a.keys() == b.keys() == set(weights)
    off = sum(float((a[n].double() - b[n].double()).square().sum()) for n in a)
    whole = sum(float(np.square(b[n].double().numpy() - weights.read(n)).sum()) for n in a)
    return (off / whole) ** 0.5


ROUTED = [n for n in plugins.names("adapters") if hasattr(plugins.load("adapters", n), "ROUTED")]


@pytest.mark.parametrize("variant", plugins.names("adapters"))
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_a_lora_there_and_back_changes_the_model_as_stated(
    old: Path, lora: Path, tmp_path: Path, variant: str, kind: str
) -> None:
    """Every variant that has factors for a LoRA, or near it, and those that have none say so."""
    if kind == "nf4":
        assert cli("quantize", old, "-o", tmp_path / "nf4")[0] == 0
        old = tmp_path / "nf4"
    there, routed = tmp_path / "there", variant in ROUTED
    # VeRA's alternating least squares are long at its own rank
    more = ("--experts", 3) if routed else ("--rank", 24) if kind == "nf4" else ()
    arguments = ("convert", lora, "-o", there, "--to", variant, "--base", old, *more)
    code, _, stderr = cli(*arguments)
    if not any(variant in plugins.load("dialects", d).VARIANTS for d in plugins.names("dialects")):
        assert (code, stderr.partition(": ")[2]) == (
            2, f"--dialect peft: cannot hold {variant}. It holds {', '.join(sorted(PEFT))}.\n",
        )  # fmt: skip
        return
    if code:
        assert code == 1
        assert stderr.startswith(f"error: {lora}: no factors of {variant} make the change of ")
        return
    stated = facts(*arguments, "--overwrite")["total"]["relative_error"]
    if not routed:
        assert error(old, there, lora) == pytest.approx(stated, rel=1e-3, abs=1e-4)
    # the change has rank 3, whatever form it takes on the way; at 64 all of it is found again
    more = ("--mixture", "mean", "--gates", "uniform") if routed else ()
    back = facts("convert", there, "-o", tmp_path / "back", "--base", old, "--rank", 64, *more)
    assert error(old, tmp_path / "back", lora) == pytest.approx(stated, rel=1e-3, abs=1e-4)
    assert routed or back["total"]["relative_error"] < 1e-4


def test_a_closed_form_that_is_kept_whole_reads_no_weight(
    old: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = facts("convert", lora, "-o", tmp_path / "alone", "--bake-scale")

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SiteWeights, "read", read)
    beside = facts("convert", lora, "-o", tmp_path / "beside", "--bake-scale", "--base", old)
    one, other = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("alone", "beside")
    )
    assert {n: t.tolist() for n, t in one.items()} == {n: t.tolist() for n, t in other.items()}
    assert alone["total"]["relative_error"] == beside["total"]["relative_error"] == 0
    assert {row["weight_error"] for row in beside["tensors"].values()} == {0}
    with pytest.raises(AssertionError, match="a weight was read"):
        cli("convert", lora, "-o", tmp_path / "cut", "--rank", "1", "--base", old)


def ia3(folder: Path, module: str, out: int) -> Path:
    """Rows scaled, in PEFT's layout."""
    folder.mkdir()
    scales = 1 + torch.linspace(-0.2, 0.2, out)[:, None]
    held = {f"base_model.model.{module}.ia3_l": scales}
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "IA3", "target_modules": [module], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_scaled_rows_become_a_lora_of_a_base_that_has_no_bias_there(
    old: Path, tmp_path: Path
) -> None:
    start = ia3(tmp_path / "up", "model.layers.0.mlp.up_proj", 160)
    found = facts("convert", start, "-o", tmp_path / "out", "--base", old, "--rank", 64)
    assert error(old, tmp_path / "out", start) < 1e-5
    assert list(found["tensors"]) == ["model.layers.0.mlp.up_proj.weight"]


def dora(old: Path, lora: Path, folder: Path) -> Path:
    """With magnitudes of its own, so that it is no LoRA at all."""
    facts("convert", lora, "-o", folder, "--to", "dora", "--base", old)
    held = load_file(folder / "adapter_model.safetensors")
    rng = torch.Generator().manual_seed(0)
    for name, t in held.items():
        if "magnitude" in name:
            t.mul_(1 + 0.2 * torch.rand(t.shape, generator=rng))
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_the_nearest_lora_of_a_dora_is_as_near_as_it_says(
    old: Path, lora: Path, tmp_path: Path
) -> None:
    start, last = dora(old, lora, tmp_path / "dora"), 1.0
    for rank in (4, 16, 64):
        out = tmp_path / f"out{rank}"
        found = facts("convert", start, "-o", out, "--base", old, "--rank", rank, "--exact")
        stated = found["total"]["relative_error"]
        assert error(old, out, start) == pytest.approx(stated, rel=1e-3, abs=1e-5)
        assert stated < last
        last = stated
        assert found["total"]["exact_modules"] == 0
    assert last < 1e-5


def test_a_dora_becomes_a_lora_with_scaled_rows_exactly(
    old: Path, lora: Path, tmp_path: Path
) -> None:
    start, out = dora(old, lora, tmp_path / "dora"), tmp_path / "out"
    ask = ("convert", start, "-o", out, "--to", "lora_rowscale")
    assert fails(*ask) == (
        2,
        "convert: dora to lora_rowscale depends on the weights that are changed. Pass --base DIR.",
    )
    found = facts(*ask, "--base", old)
    assert found["total"]["exact_modules"] == found["total"]["modules"] == 6
    assert {m["rank"] for m in found["tensors"].values()} == {3}
    assert error(old, out, start) < 1e-6
    # what is cut goes through LoRA: the nearest of that rank
    cut = facts(*ask, "--base", old, "--rank", 2, "--overwrite")["total"]["relative_error"]
    assert error(old, out, start) == pytest.approx(cut, rel=1e-3)
    assert cut > 0.01


def test_the_stated_error_is_that_of_the_whole_svd(old: Path, lora: Path, tmp_path: Path) -> None:
    start, out = dora(old, lora, tmp_path / "dora"), tmp_path / "out"
    found = facts("convert", start, "-o", out, "--base", old, "--rank", 4, "--exact")
    w, after = tensors(torch.float32), merged(old, start)
    for name, numbers in found["tensors"].items():
        d = (after[name].double() - w[name].double()).numpy()
        values = np.linalg.svd(d, compute_uv=False)
        best = (values[4:] ** 2).sum() ** 0.5
        assert numbers["relative_error"] == pytest.approx(best / np.linalg.norm(d), rel=1e-3)
        assert numbers["energy"] == pytest.approx(1 - (best / np.linalg.norm(d)) ** 2, rel=1e-3)
        assert numbers["weight_error"] == pytest.approx(best / after[name].norm().item(), rel=1e-3)


def test_a_lora_as_lora_is_written_as_it_is(lora: Path, tmp_path: Path) -> None:
    found = facts("convert", lora, "-o", tmp_path / "out")
    for name, (a, b, scale) in dense(lora).items():
        got = dense(tmp_path / "out")[name]
        np.testing.assert_array_equal(got[0], a)
        np.testing.assert_array_equal(got[1], b)
        assert got[2] == scale
    assert found["total"]["exact_modules"] == found["total"]["modules"] == 6


def test_a_servers_lora_has_one_rank_and_its_scale_in_b(tmp_path: Path) -> None:
    lora = write_lora(
        tmp_path / "lora", {"l.q": (20, 30, 3, 1.0), "l.k": (10, 12, 5, 1.0)}, use_rslora=True
    )
    out = tmp_path / "out"
    found = facts("convert", lora, "-o", out, "--uniform-rank", "--ranks-allowed", "8,16")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    for name, d in deltas(lora).items():
        np.testing.assert_allclose(deltas(out)[name], d, rtol=0, atol=1e-6 * np.abs(d).max())
        assert dense(out)[name][0].shape[0] == 8
    assert found["total"]["relative_error"] == 0


def test_a_rank_above_those_allowed_is_cut_with_its_error(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {"l.q": (20, 30, 6, 1.0), "l.k": (10, 12, 2, 1.0)})
    out = tmp_path / "out"
    found = facts("convert", lora, "-o", out, "--ranks-allowed", "2,4")
    values = np.linalg.svd(deltas(lora)["l.q"], compute_uv=False)
    best = np.sqrt((values[4:] ** 2).sum() / (values**2).sum())
    assert found["tensors"]["l.q.weight"]["relative_error"] == pytest.approx(best, rel=1e-5)
    assert {n: len(a) for n, (a, _, _) in dense(out).items()} == {"l.q": 4, "l.k": 2}


def test_bake_scale_alone_keeps_ranks(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", {"l.q": (20, 30, 3, 1.0), "l.k": (10, 12, 5, 1.0)})
    facts("convert", lora, "-o", tmp_path / "out", "--bake-scale")
    assert {n: (len(a), s) for n, (a, _, s) in dense(tmp_path / "out").items()} == {
        "l.q": (3, 1), "l.k": (5, 1),
    }  # fmt: skip


@pytest.mark.parametrize("variant", ["dora", "loha", "lora"])
def test_factors_are_written_in_the_dtype_that_is_asked_for(
    old: Path, lora: Path, tmp_path: Path, variant: str
) -> None:
    out = tmp_path / "out"
    facts("convert", lora, "-o", out, "--dtype", "bfloat16", "--to", variant, "--base", old)
    held = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in held.values()} == {torch.bfloat16}
    # 8 bits of each factor; a DoRA's magnitudes are of the whole weight, five times the change
    assert error(old, out, lora) < 0.02


def test_a_variant_that_is_a_product_is_pruned_as_one(lora: Path, tmp_path: Path) -> None:
    facts("convert", lora, "-o", tmp_path / "loha", "--to", "loha")
    found = facts("prune", tmp_path / "loha", "-o", tmp_path / "out", "--rank", 3)
    # the nine products of three and three hold a rank of three
    assert found["total"]["relative_error"] < 1e-6
    for name, d in deltas(lora).items():
        np.testing.assert_allclose(deltas(tmp_path / "out")[name], d, atol=1e-5 * np.abs(d).max())
    assert fails("prune", tmp_path / "loha", "-o", tmp_path / "loha" / "out", "--rank", 3)[0] == 1


def test_explain_asks_every_variant() -> None:
    found = facts("convert", "--explain")["ways"]
    assert list(found) == plugins.names("adapters")
    assert found["lora"] == {"to_lora": "exact", "from_lora": "exact"}
    assert found["dora"] == {
        "to_lora": "nearest of rank k, of the base", "from_lora": "exact, of the base",
    }  # fmt: skip
    assert found["loha"] == {"to_lora": "exact at rank r²", "from_lora": "exact"}
    assert found["moral"] == {
        "to_lora": "static mixture at rank N r, or an expert (--mixture)", "from_lora": "exact",
    }  # fmt: skip
    assert found["vera"] == {"to_lora": "exact", "from_lora": "nearest"}
    assert found["lokr"] == {
        "to_lora": "exact at rank 8r for [96, 80]", "from_lora": "nearest",
    }  # fmt: skip
    assert found["delta_lora"] == {
        "to_lora": "exact at rank 2r", "from_lora": "exact, of the base",
    }  # fmt: skip
    assert found["ia3"]["from_lora"] == "no factors do"
    assert found["lora_rowscale"]["from_dora"] == "exact, of the base"
    code, stdout, _ = cli("convert", "--explain")
    assert code == 0
    assert stdout.splitlines()[-1] == (
        "One variant becomes another by way of lora; dora becomes lora_rowscale without it, exactly. Of a start "
        "that took something out of the base (CorDA, LoftQ), --init or --residual tells what."
    )


def test_errors(old: Path, lora: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert fails("convert", lora, *out, "--to", "dora") == (
        2, "convert: lora to dora depends on the weights that are changed. Pass --base DIR.",
    )  # fmt: skip
    start = dora(old, lora, tmp_path / "dora")
    assert fails("convert", start, *out, "--rank", 4) == (
        2, "convert: dora to lora depends on the weights that are changed. Pass --base DIR.",
    )  # fmt: skip
    assert fails("convert", start, *out, "--base", old) == (
        2,
        "convert: dora to lora has no closed form at a small rank (model.layers.0.mlp.down_proj.weight). "
        "Pass --rank or --energy: the nearest of that rank is found.",
    )
    assert fails("convert", lora, *out, "--to", "lorra") == (
        1, "adapters: no 'lorra'. Did you mean 'lora'?",
    )  # fmt: skip
    assert fails("convert", lora, *out, "--to", "dora", "--uniform-rank") == (
        2, "--to dora: --uniform-rank and --ranks-allowed are of LoRA. Take them away.",
    )  # fmt: skip
    assert fails("convert", *out) == (2, "ADAPTER: is missing. Name one, or pass --explain.")
    assert not (tmp_path / "out").exists()
