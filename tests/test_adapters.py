"""Laws that hold for every variant. A new file in adapters/ is tested without an edit here."""

import numpy as np
import pytest
import torch

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig

# what a router does to each token, no change of W does
ROUTED = [n for n in plugins.names("adapters") if hasattr(plugins.load("adapters", n), "ROUTED")]


@pytest.fixture(params=[n for n in plugins.names("adapters") if n not in ROUTED])
def case(request):
    """(variant, W, random factors, config); alpha ≠ rank, out ≠ in, so that no mix-up hides."""
    variant = plugins.load("adapters", request.param)
    config = AdapterConfig(request.param, rank=3, alpha=7.0, rank_stabilized=True)
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(10, 6, generator=rng)
    fresh = variant.init(w, config, rng)
    factors = {k: v + 0.3 * torch.randn(v.shape, generator=rng) for k, v in fresh.items()}
    return variant, w, factors, config


def test_a_fresh_adapter_changes_nothing(case):
    variant, w, _, config = case
    factors = variant.init(w, config, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        variant.delta(w, factors, config), torch.zeros_like(w), atol=1e-6, rtol=0
    )


def test_shapes_are_the_ones_announced(case):
    variant, w, factors, config = case
    assert {k: tuple(v.shape) for k, v in factors.items()} == variant.shapes(*w.shape, config)


def test_merged_weight_computes_what_the_adapter_computes(case):
    variant, w, factors, config = case
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    merged = x @ (w + variant.delta(w, factors, config)).T
    torch.testing.assert_close(merged, variant.forward(x, w, factors, config), atol=1e-5, rtol=1e-5)


def test_linear_in_w_is_declared_rightly(case):
    variant, w, factors, config = case
    same = torch.equal(variant.delta(w, factors, config), variant.delta(2 * w, factors, config))
    assert same == variant.LINEAR_IN_W


def test_low_rank_form_is_the_delta(case):
    variant, w, factors, config = case
    form = variant.low_rank(factors, config)
    if form is not None:
        a, b = form
        torch.testing.assert_close(b @ a, variant.delta(w, factors, config), atol=1e-6, rtol=1e-5)


def test_low_rank_form_on_a_weight_is_the_delta(case):
    variant, w, factors, config = case
    if (low_rank_on := getattr(variant, "low_rank_on", None)) is None:
        return
    wanted = variant.delta(w, factors, config)
    arrays = {name: f.numpy() for name, f in factors.items()}
    for a, b in (low_rank_on(w, factors, config), low_rank_on(w.numpy(), arrays, config)):
        assert a.shape == (2 * config.rank, w.shape[1])
        np.testing.assert_allclose(np.asarray(b @ a), wanted.numpy(), atol=1e-5)


def test_arrays_and_tensors_give_the_same(case):
    variant, w, factors, config = case
    arrays = {name: factor.numpy() for name, factor in factors.items()}
    got = variant.delta(w.numpy(), arrays, config)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, variant.delta(w, factors, config).numpy(), rtol=1e-5, atol=1e-6)


def test_torch_and_numpy_agree_on_the_low_rank_form(case):
    variant, _, factors, config = case
    form = variant.low_rank(factors, config)
    arrays = variant.low_rank({name: f.numpy() for name, f in factors.items()}, config)
    for got, wanted in zip(arrays or (), form or (), strict=True):
        assert isinstance(got, np.ndarray)
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("of", [torch.Tensor.numpy, torch.clone], ids=["numpy", "torch"])
def test_what_is_made_of_a_lora_changes_the_weight_as_it_did(case, of):
    variant, w, _, _ = case
    rng = torch.Generator().manual_seed(3)
    a, b = torch.randn(3, 6, generator=rng), torch.randn(10, 3, generator=rng)
    factors = variant.from_lora(of(w), of(a), of(b))
    if factors is None:
        return
    config = AdapterConfig(variant.__name__.rpartition(".")[2], rank=3, alpha=3.0)
    got = variant.delta(of(w), factors, config)
    np.testing.assert_allclose(np.asarray(got), (b @ a).numpy(), atol=2e-5)
    assert {k: tuple(v.shape) for k, v in factors.items()} == variant.shapes(10, 6, config)


@pytest.mark.parametrize("of", [torch.Tensor.numpy, torch.clone], ids=["numpy", "torch"])
def test_what_is_made_of_any_change_is_no_farther_from_it_than_what_is_made_of_its_lora(case, of):
    variant, w, _, _ = case
    config = AdapterConfig(variant.__name__.rpartition(".")[2], rank=3, alpha=3.0)
    d = torch.randn(10, 6, generator=torch.Generator().manual_seed(3))
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    a, b = v[:3], u[:, :3] * s[:3]
    factors = variant.from_delta(of(w), of(d), (of(a), of(b)), config)
    if factors is None:
        return
    assert all(type(f) is type(of(w)) for f in factors.values())
    assert {k: tuple(v.shape) for k, v in factors.items()} == variant.shapes(10, 6, config)
    error = np.linalg.norm(np.asarray(variant.delta(of(w), factors, config)) - d.numpy())
    # better than doing nothing; as good as B A, or better, where B A is one of these
    assert error < 0.999 * d.norm()
    if variant.from_lora(of(w), of(a), of(b)) is not None:
        assert error <= (d - b @ a).norm() * (1 + 1e-5)


def test_what_is_made_of_a_change_of_its_own_is_that_change(case):
    variant, w, factors, config = case
    own = AdapterConfig(config.variant, 3, 3.0)
    d = variant.delta(w, factors, own)
    u, s, v = torch.linalg.svd(d, full_matrices=False)
    made = variant.from_delta(w, d, (v[:3], u[:, :3] * s[:3]), own)
    if made is None or made.keys() & {
        "A",
        "d",
    }:  # one of rank 3 is not told from W, VeRA's A is not its own
        return
    torch.testing.assert_close(variant.delta(w, made, own), d, atol=1e-4, rtol=1e-4)


def test_what_is_made_row_by_row_is_made_of_those_rows_alone(case):
    variant, w, factors, config = case
    names = getattr(variant, "ROWS", ())
    whole = variant.delta(w, factors, config)
    for start in range(0, 10, 4) if names else ():
        rows = slice(start, start + 4)
        part = {name: f[rows] if name in names else f for name, f in factors.items()}
        got = variant.delta(w[rows], part, config)
        torch.testing.assert_close(got, whole[rows], atol=1e-6, rtol=1e-5)


def test_a_row_without_direction_stays_zero_in_dora():
    # PEFT divides 0 by 0 there: https://github.com/huggingface/peft/issues/2049
    variant, config = plugins.load("adapters", "dora"), AdapterConfig("dora", 2, 3.0)
    w, a = torch.randn(3, 4), torch.randn(2, 4)
    w[1] = 0
    factors = {"A": a, "B": torch.zeros(3, 2), "m": torch.tensor([[2.0], [5.0], [7.0]])}
    merged = w + variant.delta(w, factors, config)
    torch.testing.assert_close(merged.norm(dim=1), torch.tensor([2.0, 0.0, 7.0]))
    assert torch.equal(merged[1], torch.zeros(4))
    assert torch.isfinite(variant.forward(torch.randn(5, 4), w, factors, config)).all()


def test_scaling_is_alpha_over_the_root_of_the_rank_only_when_stabilized():
    assert AdapterConfig("lora", 16, 8.0).scaling == 0.5
    assert AdapterConfig("lora", 16, 8.0, rank_stabilized=True).scaling == 2.0
