"""Encoders exported to ONNX: onnxruntime against transformers, PEFT and bitsandbytes' codes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from encoders import TEXTS, embedded, make_adapter, minilm_folder, run, states, tokens
from merging import done, surgery
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 40,
}  # fmt: skip


@pytest.fixture(scope="session")
def minilm() -> Path:
    return minilm_folder()


@pytest.fixture(scope="session")
def plain(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "minilm"
    done("export", minilm, "-o", out)
    return out


def as_nf4(w: Tensor) -> Tensor:
    """What bitsandbytes' codes and scales of w stand for."""
    packed, state = quantize_4bit(w.contiguous(), blocksize=64, quant_type="nf4")
    codes = packed.flatten()
    index = torch.stack([codes >> 4, codes & 15], dim=-1).flatten().long()[: w.numel()]
    return (state.code[index] * state.absmax.repeat_interleave(64)[: w.numel()]).view_as(w)


def test_minilm_in_float32_is_transformers(minilm: Path, plain: Path) -> None:
    feeds = tokens(plain)
    want = states(AutoModel.from_pretrained(minilm), feeds)
    mask = feeds["attention_mask"][..., None]
    got = run(plain / "model.onnx", feeds)
    np.testing.assert_allclose(got * mask, want * mask, rtol=0, atol=1e-5)
    # another batch, another length
    one = {k: v[:1, :5] for k, v in feeds.items()}
    one["attention_mask"] = np.ones_like(one["attention_mask"])
    want = states(AutoModel.from_pretrained(minilm), one)
    np.testing.assert_allclose(run(plain / "model.onnx", one), want, rtol=0, atol=1e-5)
    assert json.loads((plain / "surgery.json").read_text())["operation"] == "export"


@pytest.mark.parametrize(("weights", "least"), [("nf4", 0.96), ("int4", 0.96)])
def test_minilm_in_four_bits_keeps_its_embeddings(
    plain: Path, tmp_path: Path, weights: str, least: float
) -> None:
    feeds, out = tokens(plain), tmp_path / "q.onnx"
    done("quantize", plain / "model.onnx", "-o", out, "--weights", weights)
    mask = feeds["attention_mask"]
    want, got = (embedded(run(f, feeds), mask) for f in (plain / "model.onnx", out))
    # MiniLM is small and takes four bits hard; 0.970 to 0.976 were measured
    assert ((want * got).sum(axis=1) > least).all()
    # what is near stays near: no text's nearest is another's
    assert ((want @ got.T).argmax(axis=1) == np.arange(len(TEXTS))).all()


def test_minilm_with_an_adapter_in_nf4_is_what_peft_and_bitsandbytes_make_of_it(
    minilm: Path, tmp_path: Path
) -> None:
    adapter, out = make_adapter(minilm, tmp_path / "adapter"), tmp_path / "out"
    export = "export", minilm, "-o", out, "--weights", "nf4", "-a", adapter
    # the graph has no pooler, whose layer the adapter changes too
    code, message = refused(*export)
    assert (code, out.exists()) == (1, False)
    assert message == (
        f"error: {adapter}: pooler.dense.weight is adapted, but {minilm} has no such tensor. Did you "
        "mean 'encoder.layer.5.output.dense.weight'. Mend it, or leave it out with --allow-unmatched "
        "'base_model.model.pooler.dense.lora_A.weight'.\n"
    )
    allowed = "--allow-unmatched", "*pooler*"
    report = json.loads(done(*export, *allowed, "--json").stdout)
    assert report["total"]["retained"] == pytest.approx(1, abs=1e-3)
    merged = PeftModel.from_pretrained(
        AutoModel.from_pretrained(minilm), adapter
    ).merge_and_unload()
    feeds = tokens(minilm)
    before = states(AutoModel.from_pretrained(minilm), feeds)
    exact = states(merged, feeds)
    with torch.no_grad():
        for name, module in merged.named_modules():
            if isinstance(module, nn.Linear) and "pooler" not in name:
                module.weight.copy_(as_nf4(module.weight))
    mask = feeds["attention_mask"]
    want, got = states(merged, feeds), run(out / "model.onnx", feeds)
    # the merge rounds sums in another order, which may move a code by one here and there
    assert np.abs((got - want) * mask[..., None]).max() < 0.05
    assert ((embedded(got, mask) * embedded(want, mask)).sum(axis=1) > 0.9999).all()
    # nearer to the merged model than to the one before
    near = (embedded(got, mask) * embedded(exact, mask)).sum(axis=1)
    assert (near > 0.95).all()
    assert (near > (embedded(got, mask) * embedded(before, mask)).sum(axis=1)).all()


def tiny(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(**TINY, num_labels=3))
    if kind == "roberta":
        return RobertaModel(RobertaConfig(**TINY, pad_token_id=1), add_pooling_layer=False)
    names = {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    sizes = {k: TINY[k] for k in ("vocab_size", "max_position_embeddings")}
    return DistilBertModel(DistilBertConfig(**sizes, **names))


def numbers() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 60, (3, 17))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    ids[1, 9:] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


@pytest.mark.parametrize(
    ("kind", "output"),
    [("bert", "logits"), ("roberta", "last_hidden_state"), ("distilbert", "last_hidden_state")],
)
def test_each_architecture_that_is_offered_is_transformers(
    tmp_path: Path, kind: str, output: str
) -> None:
    model, out = made(kind), tmp_path / "out"
    done("export", tiny(model, tmp_path / "base"), "-o", out)
    graph = onnx.load(out / "model.onnx").graph
    assert [value.name for value in graph.output] == [output]
    feeds = {k: v for k, v in numbers().items() if k in {i.name for i in graph.input}}
    want, got = states(model, feeds), run(out / "model.onnx", feeds)
    if got.ndim == 3:
        want, got = (
            want * feeds["attention_mask"][..., None],
            got * feeds["attention_mask"][..., None],
        )
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_an_nf4_base_keeps_its_codes_and_float16_runs(tmp_path: Path) -> None:
    base = tiny(made("bert"), tmp_path / "base")
    done("quantize", base, "-o", tmp_path / "nf4", "--exclude", "classifier.weight")
    done(
        "export", tmp_path / "nf4", "-o", tmp_path / "out", "--weights", "nf4", "--exclude", "classifier"
    )  # fmt: skip
    from safetensors.numpy import load_file

    stored = load_file(tmp_path / "nf4" / "model.safetensors")
    codes = [v.ravel() for k, v in stored.items() if f"{k}.absmax" in stored]
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    packed = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name.endswith(".nf4")]
    assert len(packed) == len(codes) == 13
    assert {c.tobytes() for c in packed} == {c.tobytes() for c in codes}
    done("export", base, "-o", tmp_path / "half", "--weights", "fp16")
    got = run(tmp_path / "half" / "model.onnx", numbers()).astype(np.float32)
    # states of about 1 in float16
    np.testing.assert_allclose(got, states(made("bert"), numbers()), rtol=0, atol=5e-3)


# --- errors


def refused(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_other_architectures_and_missing_extras_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny(made("distilbert"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    out = tmp_path / "out"
    code, message = refused("export", base, "-o", out)
    assert code == 1
    assert message.startswith(
        f"error: {base}: DistilBertModel is none of the architectures that are exported: encoders (bert, "
        "distilbert, roberta), and what onnxruntime-genai builds ("
    )
    (base / "config.json").write_text(json.dumps(config))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxscript" else real(n, *a)
    )
    assert refused("export", base, "-o", out) == (
        2, "error: export: needs onnxscript. Run `pip install 'lorasurgery[export]'`.\n",
    )  # fmt: skip
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--block-size", "32"), "--block-size: means nothing to --weights fp32. Take it away."),
        (
            ("--weights", "nf4", "--zero-points"),
            "--zero-points: means nothing to --weights nf4. Take it away.",
        ),
        (("--resume",), "--resume: an export begins anew each time. Take it away."),
    ],
)
def test_flags_that_do_nothing_are_refused(
    tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    assert refused("export", tmp_path, "-o", tmp_path / "out", *flags) == (2, f"error: {message}\n")
