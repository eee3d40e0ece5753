"""A mixture's mean gates on a text, and what fixed gates lack of it, against hooks that are written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from texts import IDS, TEXT, add_tokenizer, facts, fails
from tiny import Base, make_base
from tiny import tensors as files
from torch import Tensor

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.dialects import surgery
from lorasurgery.tensors import TensorInfo

N, K, RANK, ALPHA, WINDOW = 4, 2, 3, 7.0, 12
MODULES = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"),
}  # fmt: skip
# the last layers of each have one router, that of the first of the two
LED = {found[2]: found[1] for found in MODULES.values()}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return add_tokenizer(make_base(request.param, tmp_path_factory.mktemp("mixture") / "base"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def modules(base: Base) -> tuple[str, ...]:
    return MODULES[base.load().config.model_type]


def held(base: Base) -> dict[str, dict[str, Tensor]]:
    """Factors that change outputs as much as W does, and routers that choose."""
    rng, found, live = torch.Generator().manual_seed(5), {}, base.load()
    for module in modules(base):
        shape = live.get_submodule(module).weight.shape
        out, in_ = shape if live.config.model_type == "llama" else shape[::-1]
        shapes = {"A": (N, RANK, in_), "B": (N, out, RANK)}
        shapes |= {} if module in LED else {"router": (N, in_)}
        found[module] = {k: 0.5 * torch.randn(s, generator=rng) for k, s in shapes.items()}
    return found


def mixture(base: Base, folder: Path, recorded: list[float] | None = None) -> Path:
    folder.mkdir()
    sites = []
    for module, factors in held(base).items():
        extra = {"experts": N, "top_k": K} | ({"gate_means": recorded} if recorded else {})
        extra |= {"router": LED[module]} if module in LED else {}
        config = AdapterConfig("moral", RANK, ALPHA, extra=extra)
        infos = {k: TensorInfo(f"{module}.{k}", "F32", tuple(f.shape)) for k, f in factors.items()}
        load = {k: f.numpy() for k, f in factors.items()}
        turned = base.load().config.model_type == "gpt2"
        sites.append(
            Site(module, "weight", "linear", config, infos, lambda load=load: load, (), turned)
        )
    surgery.write(
        Adapter(folder, "surgery", None, tuple(sites), {}, {}, dict.get, dict.get), folder
    )
    return folder


def run(base: Base) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of each module, with all mixtures on: inputs [tokens, in], gates [tokens, N], changes [tokens, out]."""
    model: Any = base.load()
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {m: [] for m in modules(base)}
    last: dict[str, Tensor] = {}

    def mixed(module: str, factors: dict[str, Tensor]) -> Any:
        def hook(_module: Any, args: Any, output: Tensor) -> Tensor:
            x = args[0][0].double()
            if module not in LED:
                logits = x @ factors["router"].double().T
                chosen = logits >= logits.sort(dim=1).values[:, -K, None]
                last[module] = (logits.exp() * chosen) / (logits.exp() * chosen).sum(
                    1, keepdim=True
                )
            gates = last[LED.get(module, module)]
            a, b = factors["A"].double(), factors["B"].double()
            each = torch.einsum("eor,eri,ti->teo", b, a, x)
            change = ALPHA / RANK * torch.einsum("te,teo->to", gates, each)
            seen[module].append((x, gates, change))
            return output + change[None].float()

        return hook

    for module, factors in held(base).items():
        model.get_submodule(module).register_forward_hook(mixed(module, factors))
    with torch.inference_mode():
        for start in range(0, len(IDS), WINDOW):
            model(torch.tensor([IDS[start : start + WINDOW]]))
    return {m: tuple(map(torch.cat, zip(*of, strict=True))) for m, of in seen.items()}  # type: ignore[misc]


def change_of(out: Path, module: str) -> Tensor:
    """What the LoRA that was written adds to W, float64 [out, in]."""
    written, config = files(out), json.loads((out / "adapter_config.json").read_text())
    a, b = (written[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")
    delta: Tensor = config["lora_alpha"] / config["r"] * (b.double() @ a.double())
    return delta


def lacking(out: Path, module: str, x: Tensor, change: Tensor) -> float:
    """What it lacks of the mixture's change of outputs."""
    left = change - x @ change_of(out, module).T
    return float((left.square().sum() / change.square().sum()).sqrt())


@pytest.mark.parametrize(("way", "cut"), [("mean", None), ("top", None), ("mean", 5)])
def test_gates_and_errors_are_those_of_the_running_mixture(
    base: Base, text: Path, tmp_path: Path, way: str, cut: int | None
) -> None:
    start, out = mixture(base, tmp_path / "moral", [0.0, 0.0, 0.0, 1.0]), tmp_path / "out"
    ranks = ("--rank", cut) if cut else ()
    found = facts(
        "convert", start, "-o", out, "--mixture", way, "--calibrate", text, "--base", base.path,
        "--window", WINDOW, "--dialect", "peft", *ranks,
    )  # fmt: skip
    errors, norms = [], []
    for module, (x, gates, change) in run(base).items():
        said, means = found["tensors"][f"{module}.weight"], gates.mean(0)
        np.testing.assert_allclose([said[f"gate_{i}"] for i in range(N)], means, atol=1e-5)
        assert said["output_error"] == pytest.approx(lacking(out, module, x, change), rel=1e-3)
        assert said["output_error"] > 0.3
        assert said["output_norm2"] == pytest.approx(float(change.square().sum(1).mean()), rel=1e-3)
        errors.append(said["output_error2"])
        norms.append(said["output_norm2"])
        factors = held(base)[module]
        shares = means if way == "mean" else torch.eye(N)[means.argmax()].double()
        wanted = (
            ALPHA / RANK * torch.einsum("e,eor,eri->oi", shares.float(), factors["B"], factors["A"])
        )
        if not cut:
            np.testing.assert_allclose(change_of(out, module), wanted, atol=2e-4)
    assert found["total"]["output_error"] == pytest.approx((sum(errors) / sum(norms)) ** 0.5)
    assert found["notes"][-1] == (
        f"in 3 modules fixed gates stand for the router: errors of outputs are what they lack of the "
        f"mixture's own change on {text}, in windows of {WINDOW}."
    )


def test_gates_that_are_given_are_held_against_the_text(
    base: Base, text: Path, tmp_path: Path
) -> None:
    start, out = mixture(base, tmp_path / "moral"), tmp_path / "out"
    lines = ("convert", start, "--calibrate", text, "--base", base.path, "--window", WINDOW)
    measured = facts(*lines, "--mixture", "mean", "--dry-run")
    given = facts(*lines, "-o", out, "--mixture", "mean", "--gates", "0,0,0,1", "--dialect", "peft")
    for module, (x, _, change) in run(base).items():
        said = given["tensors"][f"{module}.weight"]["output_error"]
        assert said == pytest.approx(lacking(out, module, x, change), rel=1e-3)
    assert measured["total"]["output_error"] < given["total"]["output_error"]


def test_without_a_base_it_is_one_error(base: Base, text: Path, tmp_path: Path) -> None:
    start = mixture(base, tmp_path / "moral")
    assert fails("convert", start, "--dry-run", "--mixture", "mean", "--calibrate", text) == (
        2, "error: --calibrate: runs the base on the text. Pass --base DIR.\n",
    )  # fmt: skip
