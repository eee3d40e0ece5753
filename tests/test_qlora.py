"""QLoRA: any method that goes with it, beside a base whose linear weights are NF4 and stay so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lorasurgery.codec import CodecOptions
from lorasurgery.errors import FormatError, UsageError
from lorasurgery.kernels import nf4_linear
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.surgery import RunOptions
from lorasurgery.training import method as methods
from lorasurgery.training.attach import Targets
from lorasurgery.training.examples import Reading
from lorasurgery.training.method import Wanted
from lorasurgery.training.nf4.asked import REFUSED
from lorasurgery.training.nf4.linear import NF4Linear
from lorasurgery.training.nf4.load import load
from lorasurgery.training.options import Machine, TrainOptions
from tests.training_case import begin, logits, options, run, save_base, steps

EVERY = [name for name in methods.names() if name not in REFUSED]
NF4 = CodecOptions()
# rows of a block and more, as bitsandbytes wants them
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A directory in float32, the same in NF4, and the NF4 one dequantized."""
    home = tmp_path_factory.mktemp("qlora")
    plain = save_base(home / "plain", **SIZES)
    quantize(plain, home / "nf4", QuantizeOptions(), RunOptions())
    dequantize(home / "nf4", home / "rounded", "F32", RunOptions())
    return {name: home / name for name in ("plain", "nf4", "rounded")}


def asked(method: str = "lora", nf4: CodecOptions | None = NF4, **pace: Any) -> TrainOptions:
    return replace(options(method, **pace), machine=Machine(device="cpu", nf4=nf4))


def packed(model: torch.nn.Module) -> dict[str, NF4Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, NF4Linear)}


@pytest.mark.parametrize("double", [True, False])
def test_a_base_is_packed_into_the_bytes_that_quantize_writes(bases, tmp_path, double):
    how = CodecOptions(128, double)
    quantize(bases["plain"], tmp_path / "q", QuantizeOptions(how), RunOptions())
    files = load_file(tmp_path / "q" / "model.safetensors")
    layers = packed(load(bases["plain"], torch.float32, how))
    assert len(layers) == 14
    for name, layer in layers.items():
        stored = {
            k.removeprefix(f"{name}.weight"): t for k, t in files.items() if k.startswith(name)
        }
        assert torch.equal(layer.weight, stored[""].flatten())
        assert torch.equal(layer.absmax, stored[".absmax"])
        assert layer.absmax.dtype == (torch.uint8 if double else torch.float32)
        assert torch.equal(layer.table, stored[".quant_map"])
        state = json.loads(bytes(stored[".quant_state.bitsandbytes__nf4"]))
        assert layer.block == state["blocksize"] == 128
        if double:
            assert torch.equal(layer.nested, stored[".nested_absmax"])
            assert layer.offset == np.float32(state["nested_offset"])


def test_what_is_no_linear_weight_is_kept_as_it_is(bases):
    model = load(bases["nf4"], torch.float32, NF4)
    stored = load_file(bases["plain"] / "model.safetensors")
    kept = dict(model.named_parameters())
    norms = [n for n in kept if "norm" in n]
    assert len(norms) == 5
    assert sorted(kept) == sorted(n for n in stored if "_proj.weight" not in n)
    assert all(torch.equal(kept[n], stored[n]) for n in kept)
    # no trace of a quantizer that would refuse .to() and saving
    assert not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")


def test_packed_now_and_packed_before_are_one_model_and_dequantized_it_is_the_same(bases):
    now, before = (load(bases[n], torch.float32, NF4) for n in ("plain", "nf4"))
    assert torch.equal(logits(now), logits(before))
    from transformers import AutoModelForCausalLM

    rounded = AutoModelForCausalLM.from_pretrained(bases["rounded"], dtype=torch.float32)
    # the same weights; float32 sums of 128 terms in another order, over two layers
    torch.testing.assert_close(logits(now), logits(rounded), atol=1e-6, rtol=1e-5)
    weights = rounded.state_dict()
    for name, layer in packed(now).items():
        assert torch.equal(layer.dense(), weights[f"{name}.weight"])


class Largest(TorchDispatchMode):
    """The most elements of a floating-point tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and t.is_floating_point() and t.device.type == "cpu":
                self.found = max(self.found, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_an_nf4_base_is_loaded_without_one_of_its_weights_as_floats(bases):
    with Largest() as seen:
        load(bases["nf4"], torch.float32, NF4)
    # the smallest packed weight has 64 · 32 elements, the largest 64 · 128; embeddings and the head 64 · 260
    assert seen.found <= 260 * 64
    changed = save_base(bases["nf4"].parent / "wide", **{**SIZES, "intermediate_size": 1024})
    quantize(changed, changed.with_name("wide-nf4"), QuantizeOptions(), RunOptions())
    with Largest() as seen:
        load(changed.with_name("wide-nf4"), torch.float32, NF4)
    assert seen.found <= 260 * 64 < 1024 * 64


@pytest.mark.parametrize("name", EVERY)
def test_backward_keeps_codes_and_scales_and_no_weight(bases, name):
    prepared = begin(bases["nf4"], asked(name))
    model = prepared.trainer.parts.model
    steps(prepared, 2)  # so that no factor is zero
    (batch,) = prepared.trainer.batches(3)
    sizes = {layer.in_features * layer.out_features for layer in packed(model).values()}
    factors = {f.data_ptr() for f in model.parameters()}
    kept: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in factors:
            kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=batch.tokens).logits.sum()
    shapes = {(layer.out_features, layer.in_features) for layer in packed(model).values()}
    shapes |= {shape[::-1] for shape in shapes}
    assert [t for t in kept if t.is_floating_point() and tuple(t.shape) in shapes] == []
    codes = [t for t in kept if t.dtype == torch.uint8 and 2 * t.numel() in sizes]
    # the first q, k and v see embeddings, which ask for no gradient
    assert len(codes) == len(packed(model)) - 3
    # the buffers themselves, not copies
    assert {t.data_ptr() for t in codes} <= {la.weight.data_ptr() for la in packed(model).values()}
    loss.backward()


def test_the_gradient_is_that_of_the_formula_in_float64(bases):
    layer = packed(load(bases["nf4"], torch.float32, NF4))["model.layers.1.self_attn.k_proj"]
    torch.manual_seed(0)
    x, g = torch.randn(2, 5, 64, requires_grad=True), torch.randn(2, 5, 32)
    y = layer(x)
    y.backward(g)
    w, wide = layer.dense().double(), x.detach().double()
    expected = wide @ w.T + layer.bias.double()
    limit = nf4_linear.tolerance(
        x.detach().reshape(-1, 64), layer.weight, layer.absmax, 64, 32, layer.table, layer.bias,
        layer.nested, layer.offset,
    )  # fmt: skip
    assert ((y.double() - expected).abs().reshape(-1, 32) <= limit).all()
    # sums of 32 terms, each rounded by half a unit at most
    bound = 33 * torch.finfo(torch.float32).eps * (g.double().abs() @ w.abs())
    assert ((x.grad.double() - g.double() @ w).abs() <= bound).all()
    torch.testing.assert_close(layer.bias.grad, g.sum((0, 1)))


@pytest.mark.parametrize("name", EVERY)
def test_over_nf4_a_method_learns_what_it_learns_over_the_same_weights_unpacked(bases, name):
    one = begin(bases["nf4"], asked(name, rate=1e-3, steps=5))
    plain = load(bases["nf4"], torch.float32, NF4)
    assert torch.equal(logits(one.trainer.parts.model), logits(plain))  # no step yet
    two = begin(bases["rounded"], asked(name, nf4=None, rate=1e-3, steps=5))
    # float32 sums in another order
    assert steps(one, 5) == pytest.approx(steps(two, 5), rel=1e-5)
    assert len(packed(one.trainer.parts.model)) == 14


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_a_run_leaves_the_base_as_it_was_and_the_same_adapter_whichever_form_it_had(
    bases, tmp_path, kind
):
    before = contents(bases[kind])
    total = run(bases[kind], tmp_path / kind, asked(rate=1e-2))
    run(bases["nf4"], tmp_path / "again", asked(rate=1e-2))
    assert contents(bases[kind]) == before
    name = "adapter_model.safetensors"
    assert (tmp_path / kind / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    layers = packed(load(bases["nf4"], torch.float32, NF4)).values()
    weights = sum(la.in_features * la.out_features for la in layers)
    # 4 bits a weight, 8 a block of 64, and per weight a second scale for each 256, an offset and the table
    blocks = weights // 64
    outer = sum(-(-la.in_features * la.out_features // (64 * 256)) for la in layers)
    assert total["packed_bytes"] == weights // 2 + blocks + 4 * outer + 14 * (4 + 16 * 4)
    assert total["base_parameters"] == sum(
        t.numel() for t in load_file(bases["plain"] / "model.safetensors").values()
    )


def test_merging_onto_each_form_of_the_base_differs_as_their_weights_do(bases, tmp_path):
    prepared = begin(bases["nf4"], asked(rate=1e-2, steps=4))
    steps(prepared, 4)
    trained = logits(prepared.trainer.parts.model)
    run(bases["nf4"], tmp_path / "adapter", asked(rate=1e-2, steps=4))
    far = {}
    for name in ("rounded", "plain", "nf4"):
        merge(
            bases[name], [str(tmp_path / "adapter")], tmp_path / name, MergeOptions(), RunOptions()
        )
        merged = load(tmp_path / name, torch.float32, NF4) if name == "nf4" else None
        if merged is None:
            from transformers import AutoModelForCausalLM

            merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        far[name] = float((logits(merged) - trained).norm() / trained.norm())
    # what was trained is the dequantized weight and the change: one rounding of float32
    assert far["rounded"] < 1e-5
    # the exact weight is another function, and NF4 rounds the sum once more
    assert far["plain"] > 1e-2
    assert far["nf4"] > 1e-3


def test_dropout_checkpointing_and_bfloat16_go_with_it(bases):
    wanted = Wanted(rank=4, dropout=0.2)
    machine = Machine(device="cpu", nf4=NF4, autocast=True, checkpointing=True)
    full = replace(asked("dora", steps=3), wanted=wanted)
    again = begin(bases["nf4"], replace(full, machine=machine))
    exact = begin(bases["nf4"], full)
    assert steps(again, 3) == pytest.approx(steps(exact, 3), rel=2e-2)  # bfloat16 has 8 bits
    half = Machine("bfloat16", "cpu", nf4=NF4)
    prepared = begin(bases["nf4"], replace(full, machine=half))
    layer = prepared.trainer.parts.detours.layers["model.layers.0.mlp.up_proj"]
    assert layer(torch.randn(3, 64).bfloat16()).dtype == torch.bfloat16
    assert steps(prepared, 3) == pytest.approx(steps(exact, 3), rel=5e-2)


def refused(kind: type[Exception], base: Path, wanted: TrainOptions) -> str:
    with pytest.raises(kind) as caught:
        begin(base, wanted)
    return str(caught.value)


def test_a_method_that_does_not_go_with_it_is_refused_with_the_reason(bases):
    assert refused(UsageError, bases["nf4"], asked("vera")) == (
        "--qlora: does not go with --method vera: its two vectors scale directions that were drawn at random, none of "
        "which makes up for W's rounding. Take one of them away."
    )
    # every name is one that there is, or will be
    assert set(REFUSED) == {"vera", "lora-drop", "moral"}


def test_a_packed_base_is_not_taken_for_a_plain_one(bases):
    assert refused(UsageError, bases["nf4"], asked(nf4=None)) == (
        f"{bases['nf4']}: is quantized (bitsandbytes). Pass --qlora to train on it as it is, or run "
        "`lorasurgery dequantize` first."
    )


def test_an_nf4_layer_is_not_trained_whole(bases):
    wanted = replace(asked(), targets=Targets(("q_proj",), whole=("up_proj",)))
    assert refused(UsageError, bases["nf4"], wanted) == (
        "--modules-to-save up_proj: model.layers.0.mlp.up_proj is NF4, and codes have no gradient. Leave --qlora out, "
        "or adapt it with --target-modules."
    )
    head = replace(asked(), targets=Targets(("q_proj",), whole=("lm_head",)))
    assert "lm_head.weight" in begin(bases["nf4"], head).trainer.parts.detours.whole


def test_a_packed_weight_that_no_layer_takes_is_refused(bases, tmp_path):
    import shutil

    shutil.copytree(bases["nf4"], tmp_path / "deep")
    config = json.loads((tmp_path / "deep" / "config.json").read_text())
    (tmp_path / "deep" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert refused(FormatError, tmp_path / "deep", asked()) == (
        f"{tmp_path}/deep: model.layers.1.mlp.down_proj.weight is NF4 (6 more like it), and no linear layer of "
        "LlamaForCausalLM takes it. Dequantize it with `lorasurgery dequantize`."
    )


def test_a_classifier_is_trained_over_nf4_with_its_head_whole(bases, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"some words {i}", "label": "ab"[i % 2]} for i in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = replace(asked(), data=(str(data),), reading=Reading(16, classes=("a", "b")))
    prepared = begin(bases["nf4"], wanted)
    assert len(packed(prepared.trainer.parts.model)) == 14
    assert list(prepared.trainer.parts.detours.whole) == ["score.weight"]
    assert prepared.trainer.parts.model.score.weight.shape == (2, 64)
    assert all(np.isfinite(steps(prepared, 2)))
