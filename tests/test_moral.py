"""The laws of a routed mixture: gates sum to 1, what is not chosen is not touched, fixed gates are a LoRA."""

import pytest
import torch

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import moral
from lorasurgery.errors import MatchError

N, K, RANK, OUT, IN = 4, 2, 3, 10, 6
CONFIG = AdapterConfig("moral", RANK, 7.0, extra={"experts": N, "top_k": K})


@pytest.fixture
def case():
    rng = torch.Generator().manual_seed(0)
    w, x = torch.randn(OUT, IN, generator=rng), torch.randn(2, 5, IN, generator=rng)
    fresh = moral.init(w, CONFIG, rng)
    factors = {n: f + 0.3 * torch.randn(f.shape, generator=rng) for n, f in fresh.items()}
    return w, x, factors


def test_a_fresh_mixture_changes_nothing(case):
    w, x, _ = case
    fresh = moral.init(w, CONFIG, torch.Generator().manual_seed(1))
    assert {n: tuple(f.shape) for n, f in fresh.items()} == moral.shapes(OUT, IN, CONFIG)
    assert torch.equal(moral.forward(x, w, fresh, CONFIG), x @ w.T)


def test_k_gates_are_open_and_sum_to_1(case):
    _, x, factors = case
    gates = moral.gates(x, factors["router"], CONFIG)
    assert ((gates > 0).sum(-1) == K).all()
    torch.testing.assert_close(gates.sum(-1), torch.ones(2, 5))


def test_each_token_is_the_sum_over_the_experts_that_it_chose(case):
    w, x, factors = case
    gates = moral.gates(x, factors["router"], CONFIG)
    each = torch.stack([x @ a.T @ b.T for a, b in zip(factors["A"], factors["B"], strict=True)], -1)
    wanted = x @ w.T + 7.0 / RANK * (each * gates[..., None, :]).sum(-1)
    torch.testing.assert_close(moral.forward(x, w, factors, CONFIG), wanted)


def test_an_expert_that_no_token_chose_has_no_gradient(case):
    w, _, factors = case
    x = torch.randn(1, IN)
    out = [i for i, g in enumerate(moral.gates(x, factors["router"], CONFIG)[0]) if g == 0]
    factors["B"].requires_grad_()
    moral.forward(x, w, factors, CONFIG).sum().backward()
    assert len(out) == N - K
    assert not factors["B"].grad[out].any()
    assert factors["B"].grad.any()


def test_with_a_constant_router_it_is_its_static_mixture(case):
    w, x, factors = case
    config = AdapterConfig("moral", RANK, 7.0, extra={"experts": N, "top_k": N})
    factors["router"] = torch.zeros(N, IN)
    a, b = moral.mixture(factors, config, torch.full((N,), 1 / N))
    assert a.shape[0] == N * RANK
    torch.testing.assert_close(moral.forward(x, w, factors, config), x @ (w + b @ a).T)


def test_it_has_no_delta(case):
    w, _, factors = case
    with pytest.raises(MatchError, match=r"^moral: its 4 experts are chosen for each token"):
        moral.delta(w, factors, CONFIG)
