"""LyCORIS' own forward computes what a weight does that we merged its factors into."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import loha, lokr

RANK, ALPHA = 3, 7.0


def perturbed(module: Any) -> Any:
    """All factors moved away from zero, and the module put in the layer's place."""
    torch.manual_seed(1)
    for p in module.parameters():
        p.data += 0.3 * torch.randn_like(p)
    module.apply_to()
    return module.eval()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 10), torch.linspace(-1, 1, 24).reshape(4, 6)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3), torch.linspace(-1, 1, 300).reshape(2, 6, 5, 5)),
}


@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "with cores"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_loha_of_lycoris_is_scaled_once(kind: str, tucker: bool) -> None:
    build, x = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    w = layer.weight.detach().clone()
    module = perturbed(
        LohaModule("it", layer, 1.0, RANK, ALPHA, use_tucker=tucker and kind == "convolution")
    )
    found = {n: p.detach() for n, p in module.named_parameters()}
    core = "hada_t1" in found
    factors = {
        f"{letter}{i}": found[f"hada_w{i}_{end}"].T if core and letter == "B" else found[f"hada_w{i}_{end}"]
        for i in (1, 2) for letter, end in (("B", "a"), ("A", "b"))
    }  # fmt: skip
    factors |= {f"T{i}": found[f"hada_t{i}"] for i in (1, 2) if core}
    delta = loha.delta(w, factors, AdapterConfig("loha", RANK, ALPHA))
    same(layer, w + delta.reshape(w.shape), x)


@pytest.mark.parametrize("tucker", [False, True], ids=["flat", "with cores"])
@pytest.mark.parametrize("both", [False, True], ids=["one factored", "both factored"])
@pytest.mark.parametrize("rank", [1, 8], ids=["factored", "whole"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_lokr_of_lycoris_computes_what_ours_does(
    kind: str, rank: int, *, both: bool, tucker: bool
) -> None:
    build, x = LAYERS[kind]
    torch.manual_seed(0)
    layer = build()
    w = layer.weight.detach().clone()
    flags = {"use_tucker": tucker and kind == "convolution", "decompose_both": both}
    module = perturbed(LokrModule("it", layer, 1.0, rank, ALPHA, factor=2, **flags))
    names = {
        "lokr_w1": "W1", "lokr_w1_a": "W1A", "lokr_w1_b": "W1B", "lokr_w2": "W2", "lokr_w2_a": "W2A",
        "lokr_w2_b": "W2B", "lokr_t2": "T2",
    }  # fmt: skip
    factors = {names[n]: p.detach() for n, p in module.named_parameters()}
    if "T2" in factors:
        factors["W2A"] = factors["W2A"].T
    # where both are whole, LyCORIS writes the rank as alpha
    alpha = float(module.alpha)
    delta = lokr.delta(w, factors, AdapterConfig("lokr", rank, alpha))
    same(layer, w + delta.reshape(w.shape), x)


def same(layer: nn.Module, merged: Tensor, x: Tensor) -> None:
    """What the layer computes with LyCORIS' module around it, and with the merged weight alone."""
    with torch.inference_mode():
        wanted = layer(x)
        bias = layer.bias
        plain = nn.functional.linear if x.ndim == 2 else nn.functional.conv2d
        found = plain(x, merged, bias)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
