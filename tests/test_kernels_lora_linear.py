"""A layer of NF4 with LoRA in one operator: what it keeps, and that layers of a model use it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorasurgery.adapter import AdapterConfig
from lorasurgery.kernels import double_quantize, lora_linear, nf4_quantize
from lorasurgery.kernels._packed import Packed
from lorasurgery.kernels.nf4_dequantize import NF4
from lorasurgery.training.adapted import wrap
from lorasurgery.training.nf4.linear import NF4Linear

OUT, IN, RANK, S = 24, 64, 4, 0.5


def layer() -> NF4Linear:
    rng = torch.Generator().manual_seed(1)
    codes, absmax = nf4_quantize.run(torch.randn(OUT * IN, generator=rng) / 8, 64)
    scales, nested, offset = double_quantize.run(absmax)
    made = NF4Linear(IN, OUT, nn.Parameter(torch.randn(OUT, generator=rng), requires_grad=False))
    table = torch.from_numpy(NF4.copy())
    made.hold(Packed(codes, scales, 64, OUT, table, nested, offset))
    return made


def drawn(rows: int):
    rng = torch.Generator().manual_seed(rows)
    shapes = (rows, IN), (RANK, IN), (OUT, RANK)
    return [torch.randn(s, generator=rng).requires_grad_() for s in shapes]


def adapted(variant: str, dropout: float = 0.0):
    rng, config = torch.Generator().manual_seed(3), AdapterConfig(variant, RANK, S * RANK)
    factors = {
        "A": torch.randn(RANK, IN, generator=rng),
        "B": torch.randn(OUT, RANK, generator=rng),
    }
    if variant == "adalora":
        factors["E"] = torch.randn(RANK, 1, generator=rng)
    made = wrap(layer(), config, factors, dropout)
    for factor in made.factors.values():
        factor.requires_grad_()
    return made


def kept_of(forward):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = forward()
    return kept, y


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, True), (True, False, True),
                                     (True, True, False), (False, False, True)])  # fmt: skip
def test_gradients_are_made_for_what_is_trained_alone(rows, trained):
    w, found = layer(), []
    for form in (lora_linear.run, lora_linear.reference):
        given = drawn(rows)
        for tensor, asks in zip(given, trained, strict=True):
            tensor.requires_grad_(asks)
        x, a, b = given
        form(
            x, w.weight, w.absmax, w.block, OUT, w.table, a, b, S, w.bias, w.nested, w.offset
        ).square().sum().backward()
        found.append([t.grad for t in given])
    assert [g is not None for g in found[0]] == list(trained)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 20])
def test_of_an_input_nothing_but_its_product_is_kept_where_a_is_frozen(rows):
    w = layer()
    for frozen in (True, False):
        x, a, b = drawn(rows)
        a.requires_grad_(not frozen)
        kept, _ = kept_of(lambda x=x, a=a, b=b: w.with_product(x, a, b, S))
        places = [t.data_ptr() for t in kept]
        assert (x.data_ptr() in places) != frozen
        assert (rows, RANK) in [tuple(t.shape) for t in kept]


@pytest.mark.parametrize("variant", ["lora", "adalora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_of_a_model_is_one_operator_and_gives_what_base_and_detour_give(variant, autocast):
    made, (x, *_) = adapted(variant), drawn(20)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = made(x)
        apart = made.base(x) + made.variant.detour(x, made.given, made.config)
    assert type(y.grad_fn).__name__ == "ViewBackward0"
    assert "lora_linear" in type(y.grad_fn.next_functions[0][0]).__name__
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    near = 4 * torch.finfo(y.dtype).eps
    torch.testing.assert_close(y, apart, rtol=near, atol=near * float(apart.detach().abs().max()))


def test_a_detour_that_sees_something_else_than_the_base_goes_its_own_way():
    made, (x, *_) = adapted("lora", dropout=0.5), drawn(20)
    torch.manual_seed(0)
    y = made(x)
    torch.manual_seed(0)
    want = made.base(x) + made.variant.detour(made.drop(x), made.given, made.config)
    torch.testing.assert_close(y, want, rtol=0, atol=0)
    made.eval()
    torch.testing.assert_close(made(x), adapted("lora")(x), rtol=0, atol=0)
    # and one in another dtype than the base's
    half = x.detach().bfloat16()
    wide = made.base(half) + made.variant.detour(half.float(), made.given, made.config)
    torch.testing.assert_close(made(half), wide.bfloat16(), rtol=0, atol=0)
