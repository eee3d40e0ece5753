"""AdaLoRA: the budget, what it leaves, where the rank goes, and what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import adalora as variant
from lorasurgery.errors import UsageError, ValueRangeError
from lorasurgery.training.adapted import AdaptedLinear
from lorasurgery.training.method import Place, Wanted
from lorasurgery.training.methods import adalora
from tests.training_case import begin, options, run, save_base, steps


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("adalora") / "base")


def test_the_budget_of_three_matrices_falls_from_36_to_24():
    own = adalora.Options(init_r=12, target_r=8, t_init=20, t_final=40)
    plan = adalora.schedule(Wanted(steps=200), own)
    # PEFT's RankAllocator.budget_schedule gives these
    told = {1: 36, 20: 36, 21: 35, 40: 31, 80: 26, 120: 24, 160: 24, 161: 24, 200: 24}
    assert {step: plan.budget(step, 3) for step in told} == told


def test_triplets_are_chosen_every_delta_t_steps_and_when_the_ranks_settle():
    own = adalora.Options(init_r=6, target_r=4, t_init=4, t_final=7, delta_t=5)
    plan = adalora.schedule(Wanted(steps=30), own)
    assert [step for step in range(1, 31) if plan.due(step)] == [5, 10, 15, 20, 23]


def test_the_gradients_of_a_triplet_are_those_of_the_dense_formula():
    rng = torch.Generator().manual_seed(3)
    config = AdapterConfig("adalora", 4, 6.0)
    base = nn.Linear(7, 5, dtype=torch.float64)
    factors = {n: torch.randn(s, generator=rng, dtype=torch.float64)
               for n, s in variant.shapes(5, 7, config).items()}  # fmt: skip
    layer = AdaptedLinear(base, config, {n: f.clone() for n, f in factors.items()}, 0.0)
    x, g = (torch.randn(3, n, generator=rng, dtype=torch.float64) for n in (7, 5))
    for factor in layer.factors.values():
        factor.requires_grad_()
    (layer(x) * g).sum().backward()
    dense = {n: f.clone().requires_grad_() for n, f in factors.items()}
    changed = base.weight + 6 / (4 + 1e-5) * dense["B"] @ torch.diag(dense["E"][:, 0]) @ dense["A"]
    ((x @ changed.T + base.bias) * g).sum().backward()
    for name, factor in dense.items():
        torch.testing.assert_close(layer.factors[name].grad, factor.grad, atol=1e-12, rtol=1e-12)


def test_the_ranks_that_are_left_are_the_budget_and_the_penalty_falls(base, tmp_path):
    own = adalora.Options(init_r=6, target_r=4, t_init=2, t_final=4, delta_t=2, orthogonality=0.5)
    asked = replace(options("adalora", own=own, steps=14, rate=2e-2), wanted=Wanted())
    run(base, tmp_path / "out", asked)
    told = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    left = 6 * 14, 4 * 14
    budgets = [left[0] if t <= 2 else
               int((left[0] - left[1]) * (1 - (t - 2) / 8) ** 3 + left[1]) if t <= 10 else left[1]
               for t in range(1, 15)]  # fmt: skip
    assert [line["budget"] for line in told] == budgets
    due = {t: budgets[t - 1] for t in (4, 6, 8, 10)}
    last = left[0]
    for line in told:
        last = due.get(line["step"], last)
        assert line["ranks"] == last
    assert told[-1]["penalty"] < 0.9 * told[0]["penalty"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {k: config[k] for k in ("init_r", "target_r", "tinit", "tfinal", "deltaT", "total_step")} == {
        "init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 4, "deltaT": 2, "total_step": 14,
    }  # fmt: skip
    assert sum(map(sum, config["rank_pattern"].values())) == 56
    manifest = json.loads((tmp_path / "out" / "surgery.json").read_text())
    ranks = {name: t["metrics"]["rank"] for name, t in manifest["tensors"].items()}
    assert ranks == {
        n.replace(".lora_E", ".weight"): sum(m) for n, m in config["rank_pattern"].items()
    }


def test_with_one_rank_for_first_and_last_nothing_is_left_out(base, tmp_path):
    own = adalora.Options(init_r=4)
    run(base, tmp_path / "out", options("adalora", own=own, steps=2))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["init_r"], config["target_r"], config["rank_pattern"]) == (4, 4, None)


REFUSED = {
    "--init-r 3: is where the rank begins, and it falls to --target-r 4. Begin with as much at least, and end "
    "with 1 or more.": {"init_r": 3},
    "--target-r 5: is the rank in the end, and so is --rank 4. Pass one of them.": {"target_r": 5},
    "--t-init 2, --t-final 2: leave none of 4 steps in which the budget falls. Train longer, or shorten "
    "them.": {"t_init": 2, "t_final": 2},
    "--t-init 0, --t-final 1, --delta-t 0: are no such counts of steps. Pass 0 or more, and 1 or more for "
    "--delta-t.": {"delta_t": 0},
    "--sensitivity-beta 1, --uncertainty-beta 0.85, --orthogonality 0.1: betas lie between 0 and 1, and the "
    "weight is not negative. 0.85, 0.85 and 0.1 are the authors'.": {"sensitivity_beta": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_schedule_that_cannot_be_is_refused(message):
    with pytest.raises(UsageError) as error:
        adalora.configure(Wanted(rank=4, steps=4), adalora.Options(**REFUSED[message]))
    assert str(error.value) == message


def test_a_run_that_has_not_reached_its_budget_is_not_written(base):
    prepared = begin(base, options("adalora", own=adalora.Options(), steps=10))
    steps(prepared, 2)
    hooks = prepared.trainer.parts.hooks
    left = int(hooks.figures()["ranks"])
    with pytest.raises(ValueRangeError) as error:
        hooks.finish()
    assert str(error.value) == (
        f"adalora: {left} triplets are left after step 2, but the budget is 56. Train to the end."
    )


def test_an_evaluation_before_the_ranks_settle_is_not_the_best(base):
    prepared = begin(base, options("adalora", own=adalora.Options(t_final=2), steps=5))
    trainer = prepared.trainer
    steps(prepared, 2)
    trainer.judge(0.0)
    assert trainer.best is None
    steps(prepared, 1)
    trainer.judge(1.0)
    assert trainer.best is not None
    kept = trainer.parts.hooks.state()["kept"]
    steps(prepared, 2)
    trainer.take_best()
    trainer.parts.hooks.finish()
    layers = trainer.parts.detours.layers
    assert {n: la.factors["E"].shape[0] for n, la in layers.items()} == {
        n: int(k.sum()) for n, k in kept.items()
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_layer_whose_change_has_rank_8_is_given_the_budget(seed):
    torch.manual_seed(seed)
    side, planted = 24, 1
    bases = [nn.Linear(side, side, bias=False) for _ in range(3)]
    wanted = Wanted(steps=120)
    own = adalora.Options(init_r=8, target_r=3, t_init=15, t_final=40, delta_t=5)
    config = adalora.configure(wanted, own)
    places = [Place(f"m{i}", b) for i, b in enumerate(bases)]
    factors = adalora.start(places, config, own, seed)
    layers = {p.module: AdaptedLinear(p.base, config, factors[p.module], 0.0) for p in places}
    for layer in layers.values():
        for name in adalora.TRAINED:
            layer.factors[name].requires_grad_()
    change = torch.randn(side, 8) @ torch.randn(8, side) / side
    trained = [f for layer in layers.values() for f in layer.factors.values()]
    optimizer = torch.optim.AdamW(trained, lr=4e-2, weight_decay=0.0)
    hooks = adalora.hooks(layers, wanted, own)
    for step in range(1, 121):
        loss = torch.zeros(())
        for i, (layer, b) in enumerate(zip(layers.values(), bases, strict=True)):
            x = torch.randn(32, side)
            aim = x @ (b.weight.detach() + (change if i == planted else 0)).T
            loss = loss + (layer(x) - aim).square().mean()
        (loss + hooks.penalty()).backward()
        optimizer.step()
        hooks.after(step)
        optimizer.zero_grad()
    ranks = [figures["rank"] for figures in hooks.by_module().values()]
    assert sum(ranks) == 9
    # 60 % of the budget
    assert ranks[planted] >= 0.6 * 9
    assert max(r for i, r in enumerate(ranks) if i != planted) <= 1
