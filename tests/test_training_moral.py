"""MoRAL: where its experts are, how tokens are routed while it trains, and what is recorded of that."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import moral as variant
from lorasurgery.cli.app import app
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.training.adapted import AdaptedLinear
from lorasurgery.training.attach import Targets
from lorasurgery.training.batches import Batch
from lorasurgery.training.live import add_adapter
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods import moral
from tests.training_case import TEXT, begin, logits, options, run, save_base, steps

N, K = 8, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("moral") / "base")


def experts(top_k: int = K) -> tuple[AdapterConfig, nn.Linear, dict[str, torch.Tensor]]:
    """One layer in float64."""
    rng = torch.Generator().manual_seed(2)
    config = AdapterConfig("moral", 3, 4.5, extra={"experts": N, "top_k": top_k})
    shapes = variant.shapes(5, 6, config)
    factors = {n: torch.randn(s, generator=rng, dtype=torch.float64) for n, s in shapes.items()}
    return config, nn.Linear(6, 5, dtype=torch.float64), factors


def test_gradients_are_those_of_the_dense_formula_and_none_of_an_expert_that_was_not_chosen():
    config, base, factors = experts()
    layer = AdaptedLinear(base, config, {n: f.clone() for n, f in factors.items()}, 0.0)
    rng = torch.Generator().manual_seed(3)
    x, g = (torch.randn(2, n, generator=rng, dtype=torch.float64) for n in (6, 5))
    for factor in layer.factors.values():
        factor.requires_grad_()
    (layer(x) * g).sum().backward()
    dense = {n: f.clone().requires_grad_() for n, f in factors.items()}
    scores = torch.einsum("td,nd->tn", x, dense["router"])
    open_ = scores >= scores.topk(K).values[:, -1:]
    gates = scores.masked_fill(~open_, -math.inf).softmax(-1)
    added = torch.einsum("tn,nor,nri,ti->to", gates, dense["B"], dense["A"], x)
    ((x @ base.weight.T + base.bias + 1.5 * added) * g).sum().backward()
    for name, factor in dense.items():
        torch.testing.assert_close(layer.factors[name].grad, factor.grad, atol=1e-12, rtol=1e-12)
    unused = ~open_.any(0)
    assert 4 <= int(unused.sum()) < N
    for name in ("A", "B", "router"):
        grad = layer.factors[name].grad
        assert not grad[unused].any()
        assert all(expert.any() for expert in grad[~unused])


def test_with_all_experts_and_a_router_that_says_nothing_it_is_one_lora():
    config, base, factors = experts(top_k=N)
    factors["router"].zero_()
    layer = AdaptedLinear(base, config, factors, 0.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    a = factors["A"].reshape(-1, 6)
    b = torch.cat([1.5 / N * one for one in factors["B"]], 1)
    torch.testing.assert_close(layer(x), base(x) + x @ a.T @ b.T, atol=1e-12, rtol=1e-12)


def test_tokens_in_another_order_have_their_outputs_in_that_order():
    config, base, factors = experts()
    layer = AdaptedLinear(base, config, factors, 0.0)
    x, order = torch.randn(9, 6, dtype=torch.float64), torch.randperm(9)
    torch.testing.assert_close(layer(x)[order], layer(x[order]), atol=1e-12, rtol=1e-12)


def test_experts_stand_in_the_feed_forward_blocks_unless_others_are_named(base):
    layers = begin(base, options("moral")).trainer.parts.detours.layers
    names = ("gate_proj", "up_proj", "down_proj")
    assert set(layers) == {f"model.layers.{i}.mlp.{n}" for i in range(2) for n in names}
    named = replace(options("moral"), targets=Targets(("q_proj",)))
    layers = begin(base, named).trainer.parts.detours.layers
    assert set(layers) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_parameters_are_those_of_the_experts_and_the_routers(base, tmp_path):
    total = run(base, tmp_path / "out", options("moral"))
    # N r (in + out) of gate, up, down, and N in of each router; two layers
    assert total["trained_parameters"] == 2 * (N * 4 * 3 * (32 + 48) + N * 32)


def test_each_token_has_k_experts_and_what_is_told_of_it_is_recorded(base, tmp_path):
    own = moral.Options(report_routing=True)
    asked = options("moral", own=own, rate=2e-2)
    prepared = begin(base, asked)
    every = prepared.trainer.parts.detours.layers
    layers = {path: layer for path, layer in every.items() if path.endswith("gate_proj")}
    seen = {}
    handles = [layer.register_forward_pre_hook(
        lambda layer, given, path=path: seen.setdefault(path, []).append((given[0].detach().clone(),
                                                                 layer.factors["router"].detach().clone()))
    ) for path, layer in layers.items()]  # fmt: skip
    labels = []
    for step in range(1, 4):
        labels.append(prepared.trainer.batches(step)[0].labels)
        steps(prepared, 1)
    for handle in handles:
        handle.remove()
    hooks = prepared.trainer.parts.hooks
    hooks.finish()
    told = hooks.by_module()
    for path, layer in layers.items():
        gates, chosen, count = torch.zeros(N).double(), torch.zeros(N).double(), 0.0
        for (x, router), label in zip(seen[path], labels, strict=True):
            scores = x[label != -100] @ router.T
            top = scores.topk(K).indices
            mask = torch.zeros_like(scores).scatter(1, top, 1.0).bool()
            gate = scores.masked_fill(~mask, -math.inf).softmax(-1).double()
            gates = 0.9 * gates + gate.sum(0)
            chosen = 0.9 * chosen + mask.double().sum(0)
            count = 0.9 * count + len(scores)
        # just k of each token
        assert chosen.sum().item() == pytest.approx(K * count)
        means = layer.config.extra["gate_means"]
        assert means == pytest.approx((gates / count).tolist(), rel=1e-5)
        assert sum(means) == pytest.approx(1, abs=1e-6)
        loads = list(told[path].values())
        assert loads == pytest.approx((chosen / chosen.sum()).tolist(), rel=1e-6)
        assert sum(loads) == pytest.approx(1)
    run(base, tmp_path / "out", asked)
    read = plugins.load("dialects", "surgery").read(tmp_path / "out")
    assert len(read.sites) == 6
    for site in read.sites:
        first = f"{site.module.rpartition('.')[0]}.gate_proj"
        assert site.config.extra["gate_means"] == layers[first].config.extra["gate_means"]
        assert ("router" in site.factors) == (site.module == first)
        assert site.config.extra.get("router", first) == first


def test_what_was_counted_outlives_a_stop_and_evaluations_are_not_counted(base):
    straight = begin(base, options("moral", steps=4))
    steps(straight, 4)
    first = begin(base, options("moral", steps=4))
    steps(first, 2)
    first.trainer.evaluate(first.trainer.parts.examples[:2])
    logits(first.trainer.parts.model)
    second = begin(base, options("moral", steps=4))
    second.trainer.restore(first.trainer.capture())
    steps(second, 2)
    one, two = (p.trainer.parts.hooks.state()["past"] for p in (straight, second))
    assert all(torch.equal(one[path], two[path]) for path in one)


def test_layers_of_a_block_have_the_gates_that_its_input_chose(base):
    prepared = begin(base, options("moral"))
    mlp = prepared.trainer.parts.model.model.layers[1].mlp
    rng = torch.Generator().manual_seed(4)
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.factors["B"].data.normal_(generator=rng)
    x = torch.randn(5, 32, generator=rng)
    router = mlp.gate_proj.factors["router"].detach().normal_(generator=rng)
    scores = x @ router.T
    open_ = scores >= scores.topk(K).values[:, -1:]
    gates = scores.masked_fill(~open_, -math.inf).softmax(-1)

    def mixed(layer, x):
        factors = layer.factors
        each = torch.einsum("nor,nri,ti->tno", factors["B"], factors["A"], x)
        return layer.base(x) + 2 * torch.einsum("tn,tno->to", gates, each)

    inner = torch.nn.functional.silu(mixed(mlp.gate_proj, x)) * mixed(mlp.up_proj, x)
    torch.testing.assert_close(mlp(x), mixed(mlp.down_proj, inner), atol=1e-4, rtol=1e-4)
    assert [name for name, _ in mlp.named_parameters() if "router" in name] == [
        "gate_proj.factors.router"
    ]


def test_a_layer_that_is_run_before_the_first_of_its_block_has_no_gates(base):
    mlp = begin(base, options("moral")).trainer.parts.model.model.layers[1].mlp
    message = (
        "model.layers.1.mlp.gate_proj: has the router of its block, but another layer is run before it, or on "
        "other tokens. Train with --router linear."
    )
    for _ in range(2):
        with pytest.raises(MatchError) as error:
            mlp.down_proj(torch.randn(5, 48))
        assert str(error.value) == message
        mlp.gate_proj(torch.randn(4, 32))


def test_where_routers_say_nothing_the_mean_mixture_merges_into_what_runs_beside(base, tmp_path):
    own = moral.Options(experts=2, top_k=2)
    run(base, tmp_path / "out", options("moral", own=own, rate=2e-2))
    file = tmp_path / "out" / "adapter.safetensors"
    held = load_file(file)
    held = {n: torch.zeros_like(f) if n.endswith("router") else f for n, f in held.items()}
    save_file(held, file, {"format": "pt"})
    mixed = (
        "convert",
        tmp_path / "out",
        "-o",
        tmp_path / "lora",
        "--mixture",
        "mean",
        "--gates",
        "uniform",
    )
    for call in (
        (*mixed, "--dialect", "peft"),
        ("merge", base, tmp_path / "lora", "-o", tmp_path / "merged"),
    ):
        result = CliRunner().invoke(app, [str(word) for word in call])
        assert result.exit_code == 0, result.stderr
    beside, merged, plain = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (base, tmp_path / "merged", base)
    )
    add_adapter(beside, base, tmp_path / "out")
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits(plain), logits(beside), atol=1e-3)


def test_each_layer_may_have_a_router_of_its_own(base, tmp_path):
    own = moral.Options(router="linear")
    total = run(base, tmp_path / "out", options("moral", own=own))
    assert total["trained_parameters"] == 2 * (N * 4 * 3 * (32 + 48) + N * (32 + 32 + 48))
    beside = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert all(
        "router" in la.factors for la in add_adapter(beside, base, tmp_path / "out").values()
    )
    trained = begin(base, options("moral", own=own))
    steps(trained, 3)
    torch.testing.assert_close(
        logits(beside), logits(trained.trainer.parts.model), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("weights", [{"balance": 0.25}, {"z_loss": 0.5}])
def test_the_terms_are_those_of_their_papers_and_move_the_router_alone(weights):
    config, base, factors = experts()
    layer = AdaptedLinear(base, config, factors, 0.0)
    for factor in layer.factors.values():
        factor.requires_grad_()
    hooks = moral.hooks({"m": layer}, Wanted(), moral.Options(**weights))
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(2, 7, dtype=torch.long)
    labels[1, 4:] = -100
    for row in (0, 1):  # micro-batches of different sizes
        hooks.sees(Batch(labels[row : row + 1], labels[row : row + 1]))
        layer(x[row : row + 1])
        hooks.sees(None)
        layer(x[row : row + 1])  # computed again
    term = hooks.penalty()
    term.backward()
    router = factors["router"].clone().requires_grad_()
    scores = x.detach()[labels != -100] @ router.T
    share = torch.zeros(N).double()
    for token in scores:
        share[token.topk(K).indices] += 1 / (K * len(scores))
    balance = N * (share * scores.softmax(-1).mean(0)).sum()
    z = scores.exp().sum(-1).log().square().mean()
    expected = weights.get("balance", 0) * balance + weights.get("z_loss", 0) * z
    expected.backward()
    assert term.item() == pytest.approx(expected.item())
    torch.testing.assert_close(layer.factors["router"].grad, router.grad, atol=1e-12, rtol=1e-12)
    assert layer.factors["A"].grad is None
    assert x.grad is None
    assert hooks.penalty() is None


def told(base, own, *, checkpointing=False, **pace):
    asked = options("moral", own=own, **pace)
    asked = replace(asked, machine=replace(asked.machine, checkpointing=checkpointing))
    prepared = begin(base, asked)
    return [prepared.trainer.step() for _ in range(2)]


def test_how_a_step_is_cut_and_computed_changes_none_of_its_terms(base):
    own = moral.Options(balance=0.1, z_loss=0.01)
    whole = told(base, own, batch=4)
    for other in (
        told(base, own, batch=1, accumulate=4),
        told(base, own, batch=4, checkpointing=True),
    ):
        for one, two in zip(whole, other, strict=True):
            assert one == pytest.approx(two, rel=1e-5)


def test_the_balance_is_in_the_metrics_and_1_where_experts_are_used_alike(base):
    prepared = begin(base, options("moral", own=moral.Options(balance=1.0)))
    told = prepared.trainer.step()
    # routers begin small, so that their softmax is nearly even, whatever is chosen
    assert told["penalty"] == pytest.approx(1, abs=0.2)
    assert 0 <= told["least_load"] <= 1 / N <= told["most_load"] <= 1


def test_routing_is_reported_if_asked_for(base, tmp_path):
    call = ("train", base, "--data", TEXT, "-o", tmp_path / "out", "-m", "moral", "--report-routing",
            "--experts", 3, "--topk", 1, "--steps", 2, "--batch", 2, "--length", 48, "--rank", 2)  # fmt: skip
    result = CliRunner().invoke(app, [str(a) for a in (*call, "--device", "cpu", "--json")])
    assert result.exit_code == 0, result.stderr
    tensors = json.loads(result.stdout)["tensors"]
    assert len(tensors) == 2
    for loads in tensors.values():
        assert set(loads) == {"expert_0", "expert_1", "expert_2"}
        assert sum(loads.values()) == pytest.approx(1)


REFUSED = {
    "--top-k 9: of 8 experts cannot be chosen. Pass 1 to 8.": {"top_k": 9},
    "--z-loss inf: is no weight. Pass 0 for none.": {"z_loss": math.inf},
    "--balance -1: is no weight. Pass 0 for none.": {"balance": -1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(UsageError) as error:
        moral.configure(Wanted(), moral.Options(**REFUSED[message]))
    assert str(error.value) == message
