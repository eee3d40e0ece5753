"""The loop: schedules, clipping, evaluation, stopping, states on the disk, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasurgery.errors import (
    LoraSurgeryError,
    MatchError,
    OutputError,
    UsageError,
    ValueRangeError,
)
from lorasurgery.training import state
from lorasurgery.training import train as training
from lorasurgery.training.attach import Targets
from lorasurgery.training.method import Wanted
from lorasurgery.training.methods import lora_fa, lora_plus, vera
from lorasurgery.training.options import Held, Machine
from lorasurgery.training.schedule import factor
from tests.training_case import TEXT, begin, logits, options, run, save_base, steps


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("loop") / "base")


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_rates_rise_over_the_warm_up_and_fall_as_the_schedule_says():
    def rates(kind: Any) -> list[float]:
        return [factor(step, 10, 4, kind) for step in range(1, 11)]

    rise = [0.25, 0.5, 0.75, 1.0]
    assert rates("constant") == rise + [1.0] * 6
    assert rates("linear") == pytest.approx([*rise, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [(1 + math.cos(math.pi * k / 6)) / 2 for k in range(6)]
    assert rates("cosine") == pytest.approx([*rise, *cosine])


def test_lora_plus_keeps_its_ratio_at_every_step(base, tmp_path):
    own = lora_plus.Options(ratio=16.0)
    run(base, tmp_path / "out", options("lora+", own=own, steps=6, warmup=2, schedule="cosine"))
    rows = told(tmp_path / "out")
    assert len(rows) == 6
    assert all(row["rate.B"] == pytest.approx(16 * row["rate.A"], rel=1e-12) for row in rows)
    assert len({row["rate.A"] for row in rows}) == 4  # up and down again


def test_the_first_steps_of_lora_plus_move_b_by_its_own_rate(base):
    own = lora_plus.Options(ratio=16.0)
    prepared = begin(base, options("lora+", own=own, rate=1e-3, schedule="constant", clip=None))
    layers = prepared.trainer.parts.detours.layers.values()
    a = [layer.factors["A"].detach().clone() for layer in layers]
    steps(prepared, 1)
    # B = 0 hides A's gradient, and Adam's first step is the rate itself, whatever the gradient
    assert all(torch.equal(x, layer.factors["A"]) for x, layer in zip(a, layers, strict=True))
    largest = max(float(layer.factors["B"].detach().abs().max()) for layer in layers)
    assert largest == pytest.approx(16e-3, rel=1e-3)


def test_lora_plus_with_ratio_one_is_lora_byte_for_byte(base, tmp_path):
    pace = {"rate": 1e-3, "steps": 5, "decay": 0.1}
    run(base, tmp_path / "lora", options("lora", **pace))
    run(base, tmp_path / "plus", options("lora+", own=lora_plus.Options(ratio=1.0), **pace))
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("lora", "plus"))
    assert one.read_bytes() == two.read_bytes()


def test_lora_fa_trains_b_alone_and_keeps_no_x_for_a(base):
    saved: dict[str, set[int]] = {}
    for name in ("lora", "lora-fa"):
        prepared = begin(base, options(name))
        layer = prepared.trainer.parts.detours.layers["model.layers.0.mlp.down_proj"]
        kept: set[int] = set()
        weights = {p.untyped_storage().data_ptr() for p in layer.parameters()}
        x = torch.randn(7, 48)

        def pack(
            t: torch.Tensor, kept: set[int] = kept, weights: set[int] = weights
        ) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in weights:
                kept.add(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x).sum().backward()
        saved[name] = kept
    assert saved["lora"] == {7 * 48, 7 * 4}
    assert saved["lora-fa"] == {7 * 4}


def test_the_projected_step_of_lora_fa_moves_w_along_its_gradient_within_the_reach_of_a():
    torch.manual_seed(0)
    a, s, g = torch.randn(3, 8).double(), 2.5, torch.randn(5, 8).double()
    # dL/dB of s B A is s G Aᵀ; a step of SGD on it, projected, moves s B A by -G P
    moved = s * lora_fa.projected(s * g @ a.T, a, s) @ a
    projector = a.T @ torch.linalg.inv(a @ a.T) @ a
    torch.testing.assert_close(moved, g @ projector, atol=1e-12, rtol=1e-12)


def test_lora_fa_with_dropout_is_refused(base):
    with pytest.raises(UsageError) as caught:
        begin(base, replace(options("lora-fa"), wanted=Wanted(rank=4, dropout=0.1)))
    assert str(caught.value) == (
        "--dropout 0.1: keeps a mask of x's size for each module, which is all that lora-fa saves. "
        "Take it away, or train with --method lora."
    )


def test_lora_fa_trains_magnitudes_beside_b_if_asked_to(base, tmp_path):
    """PEFT's own optimizer for it does not run on a DoRA."""
    own = lora_fa.Options(dora=True)
    prepared = begin(base, options("lora-fa", own=own))
    layers = prepared.trainer.parts.detours.layers
    before = {p: {n: f.detach().clone() for n, f in la.factors.items()} for p, la in layers.items()}
    steps(prepared, 2)
    for path, layer in layers.items():
        moved = {n for n, f in layer.factors.items() if not torch.equal(f, before[path][n])}
        assert moved == {"B", "m"}
    run(base, tmp_path / "out", options("lora-fa", own=own))
    held = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum("magnitude" in name for name in held) == len(layers)
    with pytest.raises(UsageError) as caught:
        begin(base, options("lora-fa", own=lora_fa.Options(fa_projection=True, dora=True)))
    assert str(caught.value) == (
        "--fa-projection: is derived for W + s B A, and --dora scales its rows. Take one of them away."
    )


def test_vera_shares_its_projections_and_is_read_back_from_their_seed(base, tmp_path):
    prepared = begin(base, options("vera"))
    layers = prepared.trainer.parts.detours.layers
    for name in "AB":
        assert len({la.factors[name].untyped_storage().data_ptr() for la in layers.values()}) == 1
    first = {n: layers[n].factors["d"].grad for n in layers}
    assert all(g is None for g in first.values())
    whole = run(base, tmp_path / "whole", options("vera"))
    # out + r for q, k, v, o, gate, up, down
    assert whole["trained_parameters"] == 2 * ((32 + 16 + 16 + 32 + 48 + 48 + 32) + 7 * 4)
    own = vera.Options(save_projection=False)
    run(base, tmp_path / "seed", options("vera", own=own))
    assert not [n for n in tensors(tmp_path / "seed") if "vera_A" in n]
    from lorasurgery.model import open_model
    from lorasurgery.operations._adapters import open_adapters

    model = open_model(base)
    ((one, _), (two, _)) = open_adapters([str(tmp_path / n) for n in ("whole", "seed")], model)
    for x, y in zip(one.sites, two.sites, strict=True):
        assert x.module == y.module
        assert all((x.load()[k] == y.load()[k]).all() for k in "ABbd")


def test_the_size_of_a_gradient_is_bounded(base):
    free = begin(base, options(rate=1.0, schedule="constant", optimizer="sgd", clip=None))
    norm = free.trainer.step()["grad_norm"]
    bound = begin(base, options(rate=1.0, schedule="constant", optimizer="sgd", clip=norm / 4))
    assert bound.trainer.step()["grad_norm"] == pytest.approx(norm)
    for name, layer in bound.trainer.parts.detours.layers.items():
        longer = free.trainer.parts.detours.layers[name].factors["B"]
        torch.testing.assert_close(layer.factors["B"] * 4, longer, atol=1e-6, rtol=1e-4)


def test_computing_activations_again_changes_no_bit(base):
    plain = steps(begin(base, options()), 3)
    machine = Machine(device="cpu", checkpointing=True)
    again = begin(base, replace(options(), machine=machine))
    assert again.trainer.parts.model.is_activation_checkpointing
    assert steps(again, 3) == plain


def test_bfloat16_products_train_float32_factors(base):
    exact = steps(begin(base, options()), 3)
    prepared = begin(base, replace(options(), machine=Machine(device="cpu", autocast=True)))
    rounded = steps(prepared, 3)
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)  # bfloat16 has 8 bits
    layers = prepared.trainer.parts.detours.layers.values()
    assert {f.dtype for layer in layers for f in layer.factors.values()} == {torch.float32}


def test_a_base_in_bfloat16_has_float32_factors_and_its_own_output_dtype(base):
    prepared = begin(base, replace(options(), machine=Machine(dtype="bfloat16", device="cpu")))
    layer = prepared.trainer.parts.detours.layers["model.layers.0.self_attn.q_proj"]
    assert layer.base.weight.dtype == torch.bfloat16
    assert layer.factors["A"].dtype == torch.float32
    assert layer(torch.randn(3, 32).bfloat16()).dtype == torch.bfloat16
    losses = steps(prepared, 3)
    assert losses == pytest.approx(steps(begin(base, options()), 3), rel=1e-2)


def test_the_best_evaluation_is_written_and_patience_ends_the_run(base, tmp_path):
    (tmp_path / "held.txt").write_text("0123456789 QXZ@#" * 12)  # grows less likely

    held = Held((str(tmp_path / "held.txt"),), evaluate_every=1, patience=2)
    asked = replace(options(steps=30, rate=0.3, schedule="constant"), held=held)
    total = run(base, tmp_path / "out", asked)
    rows = told(tmp_path / "out")
    losses = [row["eval_loss"] for row in rows]
    best = losses.index(min(losses)) + 1
    assert len(rows) == best + 2 < 30
    assert total["best_step"] == best
    assert total["eval_loss"] == min(losses)
    prepared = begin(base, asked)
    for step in range(1, best + 1):
        prepared.trainer.step()
        assert prepared.trainer.evaluate(prepared.held_out) == losses[step - 1]
    layer = prepared.trainer.parts.detours.layers["model.layers.1.mlp.up_proj"]
    found = tensors(tmp_path / "out")["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    assert torch.equal(found, layer.factors["B"])


def test_an_evaluation_leaves_dropout_on_and_draws_nothing(base):
    asked = replace(options(), wanted=Wanted(rank=4, dropout=0.5))
    plain, looked = begin(base, asked), begin(base, replace(asked, held=Held((str(TEXT),))))
    torch.manual_seed(1)
    expected = steps(plain, 3)
    torch.manual_seed(1)
    found = []
    for _ in range(3):
        found += steps(looked, 1)
        looked.trainer.evaluate(looked.held_out[:2])
    assert found == expected


class Killed(Exception):
    """In the middle of a run."""


def kill_at(step: int) -> Any:
    def watch(row: Any, _steps: int) -> None:
        if row["step"] == step:
            raise Killed

    return watch


def test_a_run_that_was_killed_is_resumed_to_the_same_bytes(base, tmp_path):
    wanted = Wanted(rank=4, dropout=0.2)
    (tmp_path / "held.txt").write_text(TEXT.read_text()[:300])
    held = Held((str(tmp_path / "held.txt"),), evaluate_every=2, save_every=2)
    asked = replace(options(steps=7, accumulate=2), wanted=wanted, held=held)
    run(base, tmp_path / "straight", asked)
    with pytest.raises(Killed):
        run(base, tmp_path / "stopped", replace(asked, watch=kill_at(5)))
    assert not (tmp_path / "stopped").exists()
    assert len(told(tmp_path / "stopped.partial")) == 5
    torch.manual_seed(77)
    total = run(base, tmp_path / "stopped", asked, resume=True)
    one, two = tmp_path / "straight", tmp_path / "stopped"
    name = "adapter_model.safetensors"
    assert (one / name).read_bytes() == (two / name).read_bytes()
    timeless = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in told(f)] for f in (one, two)
    ]
    assert timeless[0] == timeless[1]
    assert run(base, tmp_path / "stopped", asked, resume=True) == total  # and once more: it is done


def test_ctrl_c_ends_the_step_and_keeps_its_state(base, tmp_path):
    def watch(row: Any, _steps: int) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path / "out", replace(options(steps=4), watch=watch))
    assert signal.getsignal(signal.SIGINT) is before
    assert state.load(tmp_path / "out.partial" / training.STATE).step == 2
    run(base, tmp_path / "out", options(steps=4), resume=True)
    run(base, tmp_path / "straight", options(steps=4))
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "straight"))
    assert one.read_bytes() == two.read_bytes()


def test_another_run_does_not_go_on_with_a_state(base, tmp_path):
    with pytest.raises(Killed):
        run(base, tmp_path / "out", replace(options(), held=Held(save_every=1), watch=kill_at(2)))
    with pytest.raises(OutputError) as caught:
        run(base, tmp_path / "out", options(rate=0.5), resume=True)
    assert str(caught.value) == (
        f"{tmp_path}/out.partial: was begun by another command or with other inputs. Repeat that command, "
        "or pass --overwrite instead of --resume."
    )


def test_a_run_that_fails_before_its_first_state_leaves_nothing(base, tmp_path):
    with pytest.raises(Killed):
        run(base, tmp_path / "out", replace(options(), watch=kill_at(1)))
    assert list(tmp_path.iterdir()) == []


def spoil(base: Path, folder: Path, name: str) -> Path:
    """The base with one weight that is no number."""
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(base, folder)
    held = load_file(folder / "model.safetensors")
    held[name][0, 0] = math.nan
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_loss_that_is_no_number_names_step_and_module(base, tmp_path):
    spoilt = spoil(base, tmp_path / "spoilt", "model.layers.1.mlp.up_proj.weight")
    with pytest.raises(ValueRangeError) as caught:
        run(spoilt, tmp_path / "out", options())
    assert str(caught.value) == (
        "step 1: the loss is nan, first in model.layers.1.mlp.up_proj.base. Lower --lr, or clip with "
        "--clip."
    )
    assert not (tmp_path / "out.partial").exists()


def test_a_run_that_diverges_keeps_its_last_good_state(base, tmp_path):
    asked = options(rate=1e18, schedule="constant", clip=None, optimizer="sgd", steps=20)
    with pytest.raises(ValueRangeError) as caught:
        run(base, tmp_path / "out", replace(asked, held=Held(save_every=1)))
    saved = state.load(tmp_path / "out.partial" / training.STATE)
    assert str(caught.value).startswith(f"step {saved.step + 1}: the ")
    assert str(caught.value).endswith(
        f" {tmp_path}/out.partial keeps the state after step {saved.step}."
    )
    assert all(torch.isfinite(t).all() for t in saved.parameters.values())


def refused(base: Path, asked: Any) -> str:
    with pytest.raises(LoraSurgeryError) as caught:
        begin(base, asked)
    return str(caught.value)


def test_modules_that_nothing_is_called_are_refused_with_the_nearest(base):
    wrong = replace(options(), targets=Targets(("q_prj",)))
    assert refused(base, wrong) == (
        "--target-modules: no module is named by q_prj. Did you mean 'q_proj'?"
    )
    with pytest.raises(MatchError) as caught:
        begin(base, replace(options(), targets=Targets(whole=("lm_hed",))))
    assert str(caught.value) == (
        "--modules-to-save lm_hed: the model has no such module. Did you mean 'lm_head'?"
    )
    norm = replace(options(), targets=Targets(("input_layernorm",)))
    assert refused(base, norm) == (
        "--target-modules: model.layers.0.input_layernorm is a LlamaRMSNorm, no linear layer and no "
        "embedding. Name the layers in it."
    )


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (Targets(), 14),
        (Targets(layers=(1,)), 7),
        (Targets(("q_proj", "layers.0.mlp.up_proj")), 3),
        (Targets((r".*\.1\..*_proj",)), 7),
        (Targets(("q_proj", "k_proj"), exclude=("layers.0.self_attn.k_proj",)), 3),
        (Targets(("embed_tokens", "lm_head")), 2),
    ],
)
def test_targets_are_chosen_by_pefts_rules(base, targets, expected):
    prepared = begin(base, replace(options(), targets=targets))
    assert len(prepared.trainer.parts.detours.layers) == expected


EMBEDDED = {
    "adalora": "and AdaLoRA's files hold linear layers alone",
    "dora": "which DoRA's files in PEFT's form norm along the other axis",
    "moral": "and a router chooses by what a linear layer sees",
    "vera": "and VeRA's projections are of linear layers",
}


@pytest.mark.parametrize("method", EMBEDDED)
def test_a_method_that_does_not_fit_an_embedding_says_so_before_the_first_step(base, method):
    asked = replace(options(method), targets=Targets(("q_proj", "embed_tokens")))
    with pytest.raises(UsageError) as caught:
        begin(base, asked)
    assert str(caught.value) == (
        f"--target-modules: model.embed_tokens is an embedding, {EMBEDDED[method]}. Leave it out."
    )


def test_a_module_that_is_trained_whole_is_written_whole(base, tmp_path):
    asked = replace(options(rate=1e-2), targets=Targets(("q_proj",), whole=("lm_head",)))
    total = run(base, tmp_path / "out", asked)
    assert total["trained_parameters"] == 260 * 32 + 2 * 4 * 64
    found = tensors(tmp_path / "out")["base_model.model.lm_head.weight"]
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    assert found.shape == before.shape
    assert not torch.equal(found, before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]


def test_factors_of_one_module_are_the_same_whatever_else_is_adapted(base):
    alone = begin(base, replace(options(), targets=Targets(("down_proj",))))
    among = begin(base, options())
    name = "model.layers.1.mlp.down_proj"
    one, two = (p.trainer.parts.detours.layers[name].factors["A"] for p in (alone, among))
    assert torch.equal(one, two)
    other = begin(base, replace(options(), wanted=Wanted(rank=4, seed=1)))
    assert not torch.equal(other.trainer.parts.detours.layers[name].factors["A"], one)


def test_dora_keeps_the_norms_of_rows_that_its_magnitudes_say(base):
    asked = options("dora", rate=1e-2, steps=5)
    prepared = begin(base, asked)
    steps(prepared, 5)
    for layer in prepared.trainer.parts.detours.layers.values():
        delta = layer.variant.delta(layer.dense(), layer.given, layer.config)
        norms = (layer.dense() + delta).norm(dim=1, keepdim=True)
        torch.testing.assert_close(norms, layer.factors["m"], atol=1e-5, rtol=1e-5)


def test_a_schedule_with_a_longer_warm_up_than_the_run_is_refused(base):
    assert refused(base, options(steps=3, warmup=5)) == (
        "--warmup 5: is longer than the run of 3 steps. Shorten it."
    )


def test_a_loss_that_was_learned_is_lower(base):
    # the head learns which bytes there are
    targets = Targets(("down_proj",), whole=("lm_head",))
    prepared = begin(base, replace(options(steps=40, rate=1e-2), targets=targets))
    found = steps(prepared, 40)
    # 260 tokens: ln 260 = 5.56 knows nothing; bytes of English are not all as likely
    assert found[0] == pytest.approx(math.log(260), abs=0.1)
    assert sum(found[-5:]) / 5 < 4.5
    assert logits(prepared.trainer.parts.model).isfinite().all()
