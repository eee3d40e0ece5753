"""A MoRAL as LoRA, in the three ways that there are; a LoRA as a MoRAL that does the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from algebra import deltas, facts, fails, write_lora
from small import base, tensors

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.adapters import moral
from lorasurgery.dialects import surgery
from lorasurgery.tensors import TensorInfo

N, RANK, ALPHA = 3, 2, 5.0
MODULES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj")
GATES = (0.2, 0.7, 0.1)
PEFT = ("--dialect", "peft")


def mixture(
    folder: Path, *, gates: tuple[float, ...] | None = GATES, experts: tuple[int, ...] = (N, N)
) -> Path:
    """A MoRAL with random experts on two modules; only the first has its gates recorded otherwise."""
    folder.mkdir()
    rng, sites = torch.Generator().manual_seed(0), []
    for module, n in zip(MODULES, experts, strict=True):
        extra = {"experts": n, "top_k": 2} | ({"gate_means": list(gates)} if gates else {})
        config = AdapterConfig("moral", RANK, ALPHA, extra=extra)
        shapes = moral.shapes(*tensors()[f"{module}.weight"].shape, config)
        held = {k: 0.1 * torch.randn(s, generator=rng).numpy() for k, s in shapes.items()}
        infos = {k: TensorInfo(f"{module}.{k}", "F32", f.shape) for k, f in held.items()}
        sites.append(Site(module, "weight", "linear", config, infos, lambda held=held: held))
    nothing = Adapter(folder, "surgery", "made/by-hand", tuple(sites), {}, {}, dict.get, dict.get)
    surgery.write(nothing, folder)
    return folder


def experts(path: Path) -> dict[str, np.ndarray]:
    """s B A of each expert, float64 [experts, out, in], by module."""
    return {
        s.module: ALPHA / RANK * s.load()["B"].astype(np.float64) @ s.load()["A"]
        for s in surgery.read(path).sites
    }


def test_the_mean_mixture_weighs_each_expert_by_its_recorded_gate(tmp_path: Path) -> None:
    path, out = mixture(tmp_path / "m"), tmp_path / "out"
    found = facts("convert", path, "-o", out, *PEFT, "--mixture", "mean")
    for module, each in experts(path).items():
        wanted = np.tensordot(GATES, each, 1)
        np.testing.assert_allclose(deltas(out)[module], wanted, atol=1e-6)
    assert found["total"]["exact_modules"] == 0
    assert "relative_error" not in found["total"]
    assert found["notes"] == [
        "in 2 modules fixed gates stand for the router, whose error only text would show: exact where "
        "the gates do not depend on the token."
    ]
    assert {m["rank"] for m in found["tensors"].values()} == {N * RANK}


def test_gates_that_are_given_go_before_those_recorded(tmp_path: Path) -> None:
    path = mixture(tmp_path / "m")
    for text, gates in (("uniform", (1 / 3,) * 3), ("0.5,0,0.5", (0.5, 0, 0.5))):
        out = tmp_path / text
        facts("convert", path, "-o", out, *PEFT, "--mixture", "mean", "--gates", text)
        for module, each in experts(path).items():
            wanted = np.tensordot(gates, each, 1)
            np.testing.assert_allclose(deltas(out)[module], wanted, atol=1e-6)


def test_the_mean_mixture_is_what_a_constant_router_computes(tmp_path: Path) -> None:
    path, old = mixture(tmp_path / "m"), base(tmp_path / "base", torch.float32)
    out = tmp_path / "out"
    facts(
        "convert", path, "-o", out, *PEFT, "--mixture", "mean", "--gates", "uniform", "--base", old
    )
    for site in surgery.read(path).sites:
        w = tensors(torch.float32)[f"{site.module}.weight"]
        config = AdapterConfig("moral", RANK, ALPHA, extra={"experts": N, "top_k": N})
        factors = {k: torch.from_numpy(f) for k, f in site.load().items()}
        factors["router"].zero_()
        x = torch.randn(5, w.shape[1], generator=torch.Generator().manual_seed(1))
        added = x @ torch.from_numpy(deltas(out)[site.module]).float().T
        wanted = moral.forward(x, w, factors, config)
        torch.testing.assert_close(x @ w.T + added, wanted, atol=1e-5, rtol=1e-4)


def test_a_cut_mixture_has_the_error_of_the_mixture(tmp_path: Path) -> None:
    path, out = mixture(tmp_path / "m"), tmp_path / "out"
    found = facts("convert", path, "-o", out, *PEFT, "--mixture", "mean", "--rank", 3)
    for module, each in experts(path).items():
        s = np.linalg.svd(np.tensordot(GATES, each, 1), compute_uv=False)
        stated = found["tensors"][f"{module}.weight"]["mixture_error"]
        assert stated == pytest.approx(np.sqrt((s[3:] ** 2).sum() / (s**2).sum()), rel=1e-4)


def test_the_top_expert_stands_alone_with_its_gate_open(tmp_path: Path) -> None:
    path, out = mixture(tmp_path / "m"), tmp_path / "out"
    facts("convert", path, "-o", out, *PEFT, "--mixture", "top")
    for module, each in experts(path).items():
        np.testing.assert_allclose(deltas(out)[module], each[1], atol=1e-6)


def test_one_lora_an_expert_is_a_directory_of_adapters(tmp_path: Path) -> None:
    path, out, old = mixture(tmp_path / "m"), tmp_path / "out", base(tmp_path / "base")
    found = facts("convert", path, "-o", out, *PEFT, "--mixture", "experts")
    assert sorted(p.name for p in out.iterdir()) == [
        "expert_0", "expert_1", "expert_2", "surgery.json",
    ]  # fmt: skip
    for i in range(N):
        for module, each in experts(path).items():
            np.testing.assert_allclose(deltas(out / f"expert_{i}")[module], each[i], atol=1e-6)
    assert found["total"]["exact_modules"] == found["total"]["modules"] == 2 * N
    assert next(iter(found["tensors"])) == f"expert_0/{MODULES[0]}.weight"
    facts("merge", old, out / "expert_1", "-o", tmp_path / "merged")


def test_a_lora_becomes_experts_that_are_all_the_lora(tmp_path: Path) -> None:
    sizes = {m: (*tensors()[f"{m}.weight"].shape, 4, 1.0) for m in MODULES}
    lora, out = write_lora(tmp_path / "lora", sizes), tmp_path / "moral"
    found = facts("convert", lora, "-o", out, "--to", "moral", "--experts", 4, "--top-k", 2)
    assert found["total"]["exact_modules"] == 2
    routers = []
    for site in surgery.read(out).sites:
        assert (site.config.extra["experts"], site.config.extra["top_k"]) == (4, 2)
        w = tensors(torch.float32)[f"{site.module}.weight"]
        factors = {k: torch.from_numpy(f) for k, f in site.load().items()}
        routers.append(factors["router"])
        x = torch.randn(9, w.shape[1], generator=torch.Generator().manual_seed(1))
        wanted = x @ (w + torch.from_numpy(deltas(lora)[site.module]).float()).T
        got = moral.forward(x, w, factors, site.config)
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
        assert len(moral.gates(x, factors["router"], site.config).nonzero()[:, 1].unique()) > 2
    facts("convert", lora, "-o", tmp_path / "b", "--to", "moral", "--experts", 4, "--seed", 1)
    other = surgery.read(tmp_path / "b").sites[0].load()["router"]
    assert not np.array_equal(other, routers[0].numpy())


def test_errors(tmp_path: Path) -> None:
    path, old = mixture(tmp_path / "m", gates=None), base(tmp_path / "base")
    sizes = {m: (*tensors()[f"{m}.weight"].shape, 4, 1.0) for m in MODULES}
    lora = write_lora(tmp_path / "lora", sizes)
    out, first = ("-o", tmp_path / "out"), f"{MODULES[0]}.weight"
    assert fails("merge", old, path, *out) == (
        1,
        f"{path}: {MODULES[0]}: a router chooses among its experts for each token, so no merged weight "
        "does the same; convert it first, with --mixture mean, top or experts (1 more like it: "
        f"{MODULES[1]}.weight.A). Mend it, or leave it out with --allow-unmatched '{first}.A'.",
    )
    assert fails("convert", path, *out) == (
        2,
        f"convert: a router chooses among the 3 experts of {first} for each token. Pass --mixture mean, "
        "top, or experts.",
    )
    assert fails("convert", path, *out, "--mixture", "mean") == (
        2,
        f"convert: nobody has recorded the mean gates of {first}, which has 3 experts. Pass "
        "--calibrate TEXT and --base DIR to measure them, --gates G1,...,GN, or --gates uniform.",
    )
    assert fails("convert", path, *out, "--mixture", "mean", "--gates", "0.5,0.5") == (
        1, f"{first}: has 3 experts, but its gates are [0.5, 0.5]. Pass --gates with as many shares.",
    )  # fmt: skip
    assert fails("convert", path, *out, "--mixture", "mean", "--gates", "0.5,0.4,0.2") == (
        1,
        "--gates 0.5,0.4,0.2: sum to 1.1, and each has to be in 0...1. Pass shares of 1.",
    )
    assert fails("convert", path, *out, "--mixture", "mean", "--gates", "a,b") == (
        1, "--gates: 'a,b' is no list of numbers. Write it as 0.3,0.7, or as uniform.",
    )  # fmt: skip
    assert fails("convert", path, *out, "--mixture", "top", "--gates", "uniform") == (
        2, "--gates uniform: has no top expert. Pass --gates G1,...,GN.",
    )  # fmt: skip
    assert fails("convert", path, *out, "--gates", "uniform") == (
        2, "--gates: goes with --mixture mean or top. Add it.",
    )  # fmt: skip
    assert fails("convert", lora, *out, "--mixture", "mean") == (
        2, f"--mixture mean: {lora} has no router. Take it away.",
    )  # fmt: skip
    assert fails("convert", lora, *out, "--to", "moral") == (
        2, "--to moral: needs to know of how many experts. Pass --experts N.",
    )  # fmt: skip
    assert fails("convert", lora, *out, "--experts", 3) == (
        2, "--to lora: --experts and --top-k are of moral. Take them away.",
    )  # fmt: skip
    uneven = mixture(tmp_path / "u", experts=(3, 4))
    assert fails("convert", uneven, *out, "--mixture", "experts") == (
        1,
        f"{uneven}: some modules have 3 experts and some 4, so that no number of adapters is right. Pass "
        "--mixture mean or top.",
    )
    config = json.loads((path / "adapter.json").read_text())
    assert config["sites"][0]["extra"] == {"experts": 3, "top_k": 2}
    assert not (tmp_path / "out").exists()
    assert plugins.load("adapters", "moral").ROUTED
