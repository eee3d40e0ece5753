"""Delta-LoRA against the paper's own loop, in float64, with W moved in place; and what a bfloat16 W would lose."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig
from lorasurgery.cli.app import app
from lorasurgery.errors import LoraSurgeryError, UsageError
from lorasurgery.operations.algebra.adapter_output import AdapterFormat
from lorasurgery.operations.algebra.convert_options import ConvertOptions
from lorasurgery.operations.convert import convert
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.surgery import RunOptions
from lorasurgery.training import state
from lorasurgery.training.adapted import AdaptedLinear
from lorasurgery.training.attach import Targets
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods import delta_lora
from lorasurgery.training.options import Machine
from tests.training_case import TEXT, begin, logits, options, run, save_base, steps, tokenizer

OUT, IN, RANK, LAMBDA, START, STEPS = 7, 9, 3, 0.5, 4, 12
SCALE = 6.0 / RANK

# otherwise it stays in our own layout
AS_LORA = ConvertOptions("lora", form=AdapterFormat("peft"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("delta") / "base")


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    w, a = torch.randn(OUT, IN, generator=rng), torch.randn(RANK, IN, generator=rng)
    x, aim = torch.randn(30, IN, generator=rng), torch.randn(30, OUT, generator=rng)
    return w.to(dtype), a.double(), x.double(), aim.double()


def in_place(dtype: torch.dtype) -> tuple[list[float], Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """The paper's algorithm, word for word: losses, W before and after, and B, A after each update."""
    w, a, x, aim = data(dtype)
    before = w.clone()
    a, b = a.clone().requires_grad_(), torch.zeros(OUT, RANK, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.AdamW([a, b], lr=0.05, weight_decay=0.0)
    losses, pairs = [], [(b.detach().clone(), a.detach().clone())]
    for t in range(STEPS):
        loss = (x @ (w.double() + SCALE * b @ a).T - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        pairs.append((b.detach().clone(), a.detach().clone()))
        if t > START:
            (b1, a1), (b0, a0) = pairs[-1], pairs[-2]
            w += (LAMBDA * SCALE * (b1 @ a1 - b0 @ a0)).to(dtype)
    return losses, before, w, pairs


def lazily() -> tuple[list[float], AdaptedLinear, list[dict[str, Tensor]]]:
    """Ours, on the same numbers: losses, the layer, and its factors after each update."""
    w, a, x, aim = data(torch.float64)
    layer_base = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
    layer_base.weight.data.copy_(w)
    config = AdapterConfig("delta_lora", RANK, 6.0, extra={"lambda": LAMBDA, "start": START})
    b = torch.zeros(OUT, RANK, dtype=torch.float64)
    factors = {"A": a.clone(), "B": b.clone(), "A0": a.clone(), "B0": b.clone()}
    layer = AdaptedLinear(layer_base, config, factors, 0.0)
    trained = [layer.factors[name].requires_grad_() for name in "AB"]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    hooks = delta_lora.hooks({"m": layer}, Wanted(), delta_lora.Options(LAMBDA, START))
    losses, held = [], []
    for step in range(1, STEPS + 1):
        loss = (layer(x) - aim).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        hooks.after(step)
        losses.append(loss.item())
        held.append({n: f.detach().clone() for n, f in layer.factors.items()})
    return losses, layer, held


def test_losses_and_the_weight_are_those_of_the_paper_s_loop():
    expected, before, after, pairs = in_place(torch.float64)
    losses, layer, held = lazily()
    assert losses == pytest.approx(expected, rel=1e-12)
    assert torch.equal(layer.base.weight, before)
    (b, a), (b0, a0) = pairs[-1], pairs[START + 1]
    formula = LAMBDA * SCALE * (b @ a - b0 @ a0)
    # the identity that makes it lazy, in the paper's own numbers
    assert ((after - before) - formula).norm() / formula.norm() < 1e-12
    got = layer.given
    moved = LAMBDA * SCALE * (got["B"] @ got["A"] - got["B0"] @ got["A0"])
    assert (moved - (after - before)).norm() / formula.norm() < 1e-12
    delta = layer.variant.delta(before, got, layer.config)
    torch.testing.assert_close(before + delta, after + SCALE * b @ a, atol=1e-12, rtol=1e-12)
    assert torch.linalg.matrix_rank(delta, rtol=1e-9) == 2 * RANK
    for step, factors in enumerate(held, 1):
        same = all(torch.equal(factors[n], factors[f"{n}0"]) for n in "AB")
        assert same == (step <= START + 1)


def test_the_gradients_are_those_of_the_branch_alone():
    _, layer, _ = lazily()
    _, _, x, aim = data(torch.float64)
    for name in "AB":
        layer.factors[name].grad = None
    (layer(x) * aim).sum().backward()
    dense = {n: layer.factors[n].detach().clone().requires_grad_() for n in "AB"}
    weight = layer.base.weight + SCALE * dense["B"] @ dense["A"]
    ((x @ weight.T) * aim).sum().backward()
    for name, factor in dense.items():
        torch.testing.assert_close(layer.factors[name].grad, factor.grad, atol=1e-11, rtol=1e-11)


def test_a_bfloat16_weight_that_moves_in_place_loses_what_the_lazy_one_keeps():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(64, 64, generator=rng).bfloat16()
    moved, full = w.clone(), torch.zeros(64, 64)
    for _ in range(100):
        step = 1e-4 * torch.randn(64, 64, generator=rng)
        moved += step.bfloat16()
        full += step
    lost = ((moved.float() - w.float()) - full).norm() / full.norm()
    assert lost > 0.9
    assert float((moved == w).float().mean()) > 0.8


def test_a_bfloat16_base_takes_the_whole_delta(base, tmp_path):
    own = delta_lora.Options(0.5, 2)
    asked = replace(
        options("delta-lora", own=own, steps=6, rate=5e-3), machine=Machine("bfloat16", "cpu")
    )
    prepared = begin(base, asked)
    snapshots = {}
    for step in range(1, 7):
        steps(prepared, 1)
        if step == 3:
            snapshots = {p: {n: f.detach().clone() for n, f in la.factors.items()}
                         for p, la in prepared.trainer.parts.detours.layers.items()}  # fmt: skip
    run(base, tmp_path / "out", asked)
    adapter = plugins.load("dialects", "surgery").read(tmp_path / "out")
    for site in adapter.sites:
        held, s = site.load(), site.config.scaling
        now = prepared.trainer.parts.detours.layers[site.module].given
        then = snapshots[site.module]
        wanted = (
            0.5
            * s
            * (now["B"].double() @ now["A"].double() - then["B"].double() @ then["A"].double())
        )
        got = (
            0.5
            * s
            * (
                held["B"].astype(np.float64) @ held["A"]
                - held["B0"].astype(np.float64) @ held["A0"]
            )
        )
        assert np.linalg.norm(got - wanted.detach().numpy()) <= 1e-5 * wanted.norm().item()
        assert wanted.norm() > 0


def test_from_the_first_step_it_is_a_lora_of_alpha_times_one_plus_lambda(base):
    def losses(method: str, alpha: float, own: delta_lora.Options | None) -> list[float]:
        asked = options(method, own=own, steps=10, rate=2e-3, clip=None)
        return steps(begin(base, replace(asked, wanted=Wanted(4, alpha))), 10)

    found = losses("delta-lora", 8.0, delta_lora.Options(0.5, -1))
    # Adam takes no notice of the gradient's size
    assert found == pytest.approx(losses("lora", 12.0, None), abs=1e-3)
    assert found != pytest.approx(losses("lora", 8.0, None), abs=1e-3)


def test_it_is_written_with_its_base_and_merges_and_converts_as_it_was_trained(base, tmp_path):
    prepared = begin(base, options("delta-lora", steps=4, rate=1e-2))
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    steps(prepared, 4)
    trained = logits(prepared.trainer.parts.model)
    run(base, tmp_path / "out", options("delta-lora", steps=4, rate=1e-2))
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    said = json.loads((tmp_path / "out" / "adapter.json").read_text())["sites"]
    assert {s["variant"] for s in said} == {"delta_lora"}
    assert all(s["extra"]["base"].startswith("blake3:") for s in said)
    assert {(s["extra"]["lambda"], s["extra"]["start"]) for s in said} == {(0.5, 0)}
    convert(tmp_path / "out", tmp_path / "lora", AS_LORA, RunOptions())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == 2 * 4
    call = [str(tmp_path / "lora")], tmp_path / "merged", MergeOptions(), RunOptions()
    merge(base, *call)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), trained, atol=2e-5, rtol=1e-4)
    other = save_base(tmp_path / "other", initializer_range=0.03)
    with pytest.raises(
        LoraSurgeryError, match="but the adapter belongs to a base where it has blake3:"
    ):
        merge(other, [str(tmp_path / "out")], tmp_path / "wrong", MergeOptions(), RunOptions())


def test_what_w_has_moved_by_is_a_file_of_its_own_if_asked_for(base, tmp_path):
    own = delta_lora.Options(0.5, 2, save_base_delta=True)
    asked = options("delta-lora", own=own, steps=6, rate=1e-2)
    prepared = begin(base, asked)
    pairs = []
    layers = prepared.trainer.parts.detours.layers
    for _ in range(6):
        steps(prepared, 1)
        pairs.append(
            {p: {n: f.detach().double() for n, f in la.factors.items()} for p, la in layers.items()}
        )
    run(base, tmp_path / "out", asked)
    moved = load_file(tmp_path / "out" / "base_delta.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weights = plain.state_dict()
    for path in layers:
        now, then = pairs[5][path], pairs[2][path]
        wanted = 0.5 * 2 * (now["B"] @ now["A"] - then["B"] @ then["A"])
        got = moved.pop(f"{path}.weight").double()
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
        assert wanted.norm() > 0
        # with the LoRA itself on top it is what was trained
        weights[f"{path}.weight"] += (got + 2 * now["B"] @ now["A"]).float()
    assert moved == {}
    trained = logits(prepared.trainer.parts.model)
    torch.testing.assert_close(logits(plain), trained, atol=2e-5, rtol=1e-4)
    # the adapter beside it is read as if it were alone
    assert len(plugins.load("dialects", "surgery").read(tmp_path / "out").sites) == len(layers)
    run(base, tmp_path / "none", replace(asked, own=replace(own, save_base_delta=False)))
    assert not (tmp_path / "none" / "base_delta.safetensors").exists()


def test_a_weight_that_is_stored_turned_moves_turned(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=260)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer().save_pretrained(tmp_path / "gpt2")
    own = delta_lora.Options(0.5, -1, save_base_delta=True)
    run(tmp_path / "gpt2", tmp_path / "out", options("delta-lora", own=own, rate=1e-2))
    moved = load_file(tmp_path / "out" / "base_delta.safetensors")
    stored = load_file(tmp_path / "gpt2" / "model.safetensors")
    assert len(moved) == 4
    assert all(stored[name].shape == change.shape for name, change in moved.items())
    assert {tuple(change.shape) for change in moved.values()} >= {(32, 96), (128, 32)}


def test_an_embedding_is_adapted_too(base):
    asked = replace(options("delta-lora", rate=1e-2), targets=Targets(("embed_tokens",)))
    prepared = begin(base, asked)
    plain = logits(prepared.trainer.parts.model)
    steps(prepared, 3)
    (layer,) = prepared.trainer.parts.detours.layers.values()
    tokens = torch.arange(5)
    got = {name: factor.detach() for name, factor in layer.given.items()}
    delta = layer.variant.delta(layer.dense(), got, layer.config)
    torch.testing.assert_close(layer(tokens), layer.base(tokens) + delta[tokens])
    assert not torch.equal(logits(prepared.trainer.parts.model), plain)


def test_the_snapshot_outlives_a_stop_on_either_side_of_its_step(base, tmp_path):
    own = delta_lora.Options(0.5, 2)
    for stop in (2, 4):
        straight = begin(base, options("delta-lora", own=own, steps=6))
        expected = steps(straight, 6)
        first = begin(base, options("delta-lora", own=own, steps=6))
        steps(first, stop)
        file = Path(tmp_path / f"{stop}.pt")
        state.save(first.trainer.capture(), file)
        second = begin(base, options("delta-lora", own=own, steps=6))
        second.trainer.restore(state.load(file))
        assert steps(second, 6 - stop) == expected[stop:]
        one, two = (p.trainer.parts.detours.layers for p in (straight, second))
        for path, layer in one.items():
            assert all(torch.equal(f, two[path].factors[n]) for n, f in layer.factors.items())


def test_lambda_is_typed_or_read_from_a_file(base, tmp_path):
    small = {"data": [str(TEXT)], "steps": 1, "length": 32, "batch": 1, "device": "cpu"}
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({**small, "method": "delta-lora", "lambda": 0.25, "start": -1}))
    call = ["train", str(base), "-c", str(file), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 0, result.stderr
    (one, *_) = json.loads((tmp_path / "out" / "adapter.json").read_text())["sites"]
    assert (one["extra"]["lambda"], one["extra"]["start"]) == (0.25, -1)
    file.write_text(json.dumps(small))
    result = CliRunner().invoke(app, [*call[:-1], str(tmp_path / "other"), "--lambda", "1"])
    assert result.exit_code == 2
    assert result.stderr == "error: --lambda: means nothing to lora. It belongs to delta-lora.\n"


REFUSED = {
    "--dropout 0.1: what B A learns behind a mask is not what W would, so that Delta-LoRA has none. Take it "
    "away.": (Wanted(dropout=0.1), delta_lora.Options()),
    "--lambda -1: is no such strength. 0.5 and 2 are the paper's.": (Wanted(), delta_lora.Options(-1.0)),
    "--start -2: is before the first step. Pass -1 to move from the first on.":
        (Wanted(), delta_lora.Options(start=-2)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(UsageError) as error:
        delta_lora.configure(*REFUSED[message])
    assert str(error.value) == message
