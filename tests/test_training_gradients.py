"""Gradients and counts of every method, against formulas that are written out here, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lorasurgery import plugins
from lorasurgery.training import method as methods
from lorasurgery.training.adapted import sides
from lorasurgery.training.options import Machine
from tests.training_case import OWN, begin, options, save_base

EVERY = methods.names()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("gradients") / "base")


def lora(x: Tensor, w: Tensor, f: Mapping[str, Tensor], s: float) -> Tensor:
    return x @ (w + s * f["B"] @ f["A"]).T


def dora(x: Tensor, w: Tensor, f: Mapping[str, Tensor], s: float) -> Tensor:
    v = w + s * f["B"] @ f["A"]
    # section 4.3 of the paper: the norm is a constant to the gradient
    return x @ (f["m"] * v / v.detach().norm(dim=1, keepdim=True)).T


def vera(x: Tensor, w: Tensor, f: Mapping[str, Tensor], _s: float) -> Tensor:
    return x @ (w + torch.diag(f["b"]) @ f["B"] @ torch.diag(f["d"]) @ f["A"]).T


def adalora(x: Tensor, w: Tensor, f: Mapping[str, Tensor], s: float) -> Tensor:
    return x @ (w + s * f["B"] @ torch.diag(f["E"][:, 0]) @ f["A"]).T


def delta_lora(x: Tensor, w: Tensor, f: Mapping[str, Tensor], s: float) -> Tensor:
    moved = f["B"] @ f["A"] - f["B0"] @ f["A0"]
    strength = OWN["delta-lora"]()["strength"]
    return x @ (w + s * f["B"] @ f["A"] + strength * s * moved.detach()).T


def moral(x: Tensor, w: Tensor, f: Mapping[str, Tensor], s: float) -> Tensor:
    logits = x @ f["router"].T
    least = logits.topk(2, dim=-1).values[:, -1:]
    gates = logits.masked_fill(logits < least, -math.inf).softmax(-1)
    return x @ w.T + s * torch.einsum("ti,nri,nor,tn->to", x, f["A"], f["B"], gates)


# alpha 8, rank 4; AdaLoRA's begins with 5 triplets, and divides by a little more
FORMULAS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "lora": (lora, 2.0),
    "lora+": (lora, 2.0),
    "lora-fa": (lora, 2.0),
    "rslora": (lora, 8 / math.sqrt(4)),
    "lora-drop": (lora, 2.0),
    "dora": (dora, 2.0),
    "vera": (vera, 1.0),
    "adalora": (adalora, 8 / (5 + 1e-5)),
    "delta-lora": (delta_lora, 2.0),
    "moral": (moral, 2.0),
}


def prepared_in_float64(base: Any, name: str) -> Any:
    alpha = None if name == "vera" else 8.0
    asked = options(name)
    wanted = replace(asked.wanted, alpha=alpha)
    return begin(base, replace(asked, wanted=wanted, machine=Machine("float64", "cpu")))


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_dense_formula(base, name):
    formula, s = FORMULAS[name]
    prepared = prepared_in_float64(base, name)
    layers = prepared.trainer.parts.detours.layers
    # the router of a block is the first layer's
    name = "gate_proj" if name == "moral" else "down_proj"
    layer = next(la for path, la in layers.items() if path.endswith(f"layers.1.mlp.{name}"))
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for factor in layer.factors.values():
            assert factor.dtype == torch.float64
            factor.add_(0.3 * torch.randn(factor.shape, generator=dice, dtype=torch.float64))
    sizes = layer.in_features, layer.out_features
    x, pull = (torch.randn(11, n, generator=dice, dtype=torch.float64) for n in sizes)
    trained = [p for p in layer.factors.values() if p.requires_grad]
    assert trained
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(one)
    bias = 0 if layer.bias is None else layer.bias
    expected = formula(two, layer.base.weight, layer.given, s) + bias
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-11)
    ours = torch.autograd.grad((found * pull).sum(), [one, *trained])
    theirs = torch.autograd.grad((expected * pull).sum(), [two, *trained])
    for mine, dense in zip(ours, theirs, strict=True):
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, dense, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_trained_is_as_many_numbers_as_the_shapes_say(base, name):
    prepared = begin(base, options(name))
    trained = methods.load(name).TRAINED
    sizes = {}
    for layer in prepared.trainer.parts.detours.layers.values():
        out, in_ = sides(layer.base)
        variant = plugins.load("adapters", layer.config.variant)
        shapes = variant.shapes(out, in_, layer.config)
        # what modules share is counted once
        sizes |= {id(layer.given[n]): math.prod(shapes[n]) for n in trained if n in shapes}
    members = [m.parameter for group in prepared.groups for m in group.members]
    assert sum(p.numel() for p in members) == sum(sizes.values())
