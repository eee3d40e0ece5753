"""Decoders exported to ONNX: onnxruntime and onnxruntime-genai against transformers and bitsandbytes' codes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from decoders import TOKENS, make_decoder, scores
from merging import done, make_adapter, surgery
from safetensors.numpy import load_file
from tiny import Base
from transformers import AutoModelForCausalLM

from lorasurgery.export import _onnx_decoder
from lorasurgery.operations.running import by_genai, by_onnxruntime


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("decoder") / "base")


@pytest.fixture(scope="session")
def nf4(decoder: Path) -> Path:
    out = decoder.with_name("nf4")
    done("quantize", decoder, "-o", out)
    return out


@pytest.fixture(scope="session")
def dequantized_nf4(nf4: Path) -> Path:
    """What the codes stand for. bitsandbytes itself computes in bfloat16 on CPUs that have it, whatever is asked."""
    out = nf4.with_name("dequantized")
    done("dequantize", nf4, "-o", out, "--dtype", "float32")
    return out


@pytest.fixture(scope="session")
def nf4_exported(nf4: Path) -> Path:
    out = nf4.with_name("nf4-onnx")
    done("export", nf4, "-o", out, "--weights", "nf4")
    onnx.checker.check_model(out / "model.onnx")
    return out


@pytest.fixture(scope="session")
def adapter(decoder: Path) -> Path:
    base = Base(decoder, AutoModelForCausalLM, torch.float32)
    return make_adapter(
        base, decoder.with_name("adapter"), target_modules=["q_proj", "up_proj", "lm_head"]
    )


@pytest.fixture(scope="session")
def int4_exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base whose head is its embedding, and its export with products in float32."""
    home = tmp_path_factory.mktemp("tied")
    base = make_decoder(home / "base", 1, tie_word_embeddings=True)
    done(
        "export", base, "-o", home / "int4", "--weights", "int4", "--zero-points", "--accuracy-level", 1
    )  # fmt: skip
    onnx.checker.check_model(home / "int4" / "model.onnx")
    return base, home / "int4"


def held(folder: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(folder / "model.onnx").graph
    return {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def test_an_nf4_base_keeps_exactly_its_codes(nf4: Path, nf4_exported: Path) -> None:
    stored, found = load_file(nf4 / "model.safetensors"), held(nf4_exported)
    for layer in range(2):
        theirs = f"model.layers.{layer}.self_attn"
        qkv = np.concatenate([stored[f"{theirs}.{x}_proj.weight"].ravel() for x in "qkv"])
        ours = found[f"model.layers.{layer}.attn.qkv_proj.MatMul.weight.nf4"]
        np.testing.assert_array_equal(ours, qkv)
        down = stored[f"model.layers.{layer}.mlp.down_proj.weight"].ravel()
        np.testing.assert_array_equal(
            found[f"model.layers.{layer}.mlp.down_proj.MatMul.weight.nf4"], down
        )
    ops = [node.op_type for node in onnx.load(nf4_exported / "model.onnx").graph.node]
    assert (ops.count("MatMulBnb4"), ops.count("MatMul")) == (2 * 5, 1)


def test_both_runtimes_compute_what_transformers_does(
    dequantized_nf4: Path, nf4_exported: Path
) -> None:
    want = scores(dequantized_nf4)
    for run in (by_genai, by_onnxruntime):
        got = run.load(nf4_exported).logits(TOKENS)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_the_greedy_text_is_transformers_in_both_runtimes(
    dequantized_nf4: Path, nf4_exported: Path
) -> None:
    prompt = "w5 w9 w60"
    answers = {}
    for name, folder, runtime in (
        ("transformers", dequantized_nf4, "auto"),
        ("onnxruntime-genai", nf4_exported, "auto"),
        ("onnxruntime", nf4_exported, "onnxruntime"),
    ):
        said = done("generate", folder, prompt, "-n", 20, "--runtime", runtime, "--json").stdout
        answers[name] = json.loads(said)["answers"][prompt]
        assert json.loads(said)["runtime"] == name
    assert len(set(answers.values())) == 1, answers
    assert len(answers["onnxruntime"].split()) > 5


def test_evaluate_compares_models_across_runtimes(
    dequantized_nf4: Path, nf4_exported: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{(7 * i * i + i) % 61}" for i in range(40)))
    said = done(
        "evaluate", dequantized_nf4, nf4_exported, "--text", text, "--window", 16, "--json"
    ).stdout  # fmt: skip
    found = json.loads(said)
    assert (found["runtime"], found["other_runtime"]) == ("transformers", "onnxruntime-genai")
    # both multiply by the same numbers
    assert abs(found["divergence"]) < 1e-8
    assert found["agreement"] == 1
    assert found["perplexity"] == pytest.approx(found["other_perplexity"], rel=1e-4)


def dequantized(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """int4 [out, in] as MatMulNBits' page defines it: (q - z) s, low nibble first."""

    def codes(packed: np.ndarray) -> np.ndarray:
        return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)

    scales = tensors[f"{name}.scales"]
    q = codes(tensors[f"{name}.int4"]).reshape(*scales.shape, 32).astype(np.float32)
    z = codes(tensors[f"{name}.zeros"])[:, : scales.shape[1]].astype(np.float32)
    return ((q - z[..., None]) * scales[..., None]).reshape(len(q), -1)


def test_int4_computes_with_its_codes_in_products_head_and_embedding(
    int4_exported: tuple[Path, Path],
) -> None:
    base, exported = int4_exported
    tensors = held(exported)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    modules = dict(model.named_modules())
    changed = 0.0
    with torch.no_grad():
        for name in [n.removesuffix(".int4") for n in tensors if n.endswith(".int4")]:
            w = torch.from_numpy(dequantized(tensors, name))
            path = name.removesuffix(".MatMul.weight").replace(".attn.", ".self_attn.")
            parts = [path.replace("qkv", x) for x in "qkv"] if "qkv" in path else [path]
            rows = [modules[part].weight.shape[0] for part in parts]
            for part, new in zip(parts, w.split(rows), strict=True):
                changed = max(changed, float((modules[part].weight - new).abs().max()))
                modules[part].weight.copy_(new)
        want = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    assert changed > 0.01
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(t.dtype == np.float32 and t.shape == (64, 72) for t in tensors.values())
    for run in (by_genai, by_onnxruntime):
        got = run.load(exported).logits(TOKENS)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_a_merged_adapter_is_pefts_and_float16_holds_it(
    decoder: Path, adapter: Path, tmp_path: Path
) -> None:
    from merging import merged_by_peft

    out = tmp_path / "out"
    report = json.loads(
        done("export", decoder, "-o", out, "--weights", "fp16", "-a", adapter, "--json").stdout
    )
    assert report["total"]["retained"] == pytest.approx(1, abs=1e-6)
    base = Base(decoder, AutoModelForCausalLM, torch.float32)
    with torch.no_grad():
        want = merged_by_peft(base, (adapter, 1.0))(torch.from_numpy(TOKENS)[None]).logits[0]
    before = scores(decoder)
    for run in (by_genai, by_onnxruntime):
        got = run.load(out).logits(TOKENS)
        # weights of about 1 to 11 bits
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-3 * float(want.abs().max()))
        assert np.abs(got - before).max() > 50 * np.abs(got - want.numpy()).max()
    halves = [t for t in held(out).values() if t.ndim == 2 and t.size > 72 * 64 - 1]
    assert {t.dtype for t in halves if t.shape != (2048, 8)} == {np.dtype(np.float16)}
    # everything that was adapted has its numbers in the report
    names = (
        {r["name"] for r in report["tensors"]}
        if isinstance(report["tensors"], list)
        else set(report["tensors"])
    )
    assert any("q_proj" in n for n in names)


# --- errors


def refused(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_what_is_not_exported_is_one_error_and_nothing_is_written(
    decoder: Path, nf4: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    code, message = refused("export", nf4, "-o", out, "--weights", "nf4", "-a", adapter)
    assert (code, message) == (
        2,
        f"error: --weights nf4: {nf4} is NF4 already, and rounding to the same grid again would take the "
        "merged adapters away. Export the model it was made of, pass --weights int8 or "
        "--adapters-as-inputs, or merge with --requantize before.\n",
    )
    strange = make_decoder(tmp_path / "strange")
    config = json.loads((strange / "config.json").read_text())
    (strange / "config.json").write_text(
        json.dumps({**config, "architectures": ["MambaForCausalLM"]})
    )
    code, message = refused("export", strange, "-o", out)
    assert code == 1
    assert message.startswith(
        f"error: {strange}: MambaForCausalLM is none of the architectures that are exported: encoders "
        "(bert, distilbert, roberta), and what onnxruntime-genai builds (ChatGLMForConditionalGeneration, "
    )
    assert "LlamaForCausalLM" in message
    assert message.endswith(
        "). Export it with its own tools, and quantize or merge the ONNX file.\n"
    )
    (strange / "config.json").write_text(json.dumps(config))
    for file in strange.glob("tokenizer*"):
        file.unlink()
    assert refused("export", strange, "-o", out) == (
        1,
        f"error: {strange}: has no tokenizer, which onnxruntime-genai carries along. Put tokenizer.json "
        "beside the weights.\n",
    )
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda n, *a: None if n == "onnxruntime_genai" else real(n, *a),
    )
    assert refused("export", decoder, "-o", out) == (
        2,
        "error: export: a decoder needs onnxruntime-genai. Run `pip install 'lorasurgery[genai]'`.\n",
    )
    assert not out.exists()


def test_a_builder_that_fails_leaves_nothing(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_onnx_decoder, "_BUILDER", "onnxruntime_genai.no_builder")
    code, message = refused("export", decoder, "-o", tmp_path / "out")
    assert (code, message) == (
        1,
        f"error: {decoder}: onnxruntime-genai does not build it ({sys.executable}: No module named "
        "onnxruntime_genai.no_builder).\n",
    )
    assert not list(tmp_path.iterdir())


def test_an_onnx_file_that_is_no_decoder_says_so(tmp_path: Path) -> None:
    from tests import onnx_files

    file = onnx_files.chain(tmp_path / "model.onnx")
    assert refused("generate", tmp_path, "w1") == (
        1,
        f"error: {file}: is no decoder with a cache: it makes y of x. Look into it with `inspect`.\n",
    )
    file.write_bytes(b"no graph")
    assert refused("generate", tmp_path, "w1") == (
        1,
        f"error: {file}: is no whole ONNX file (wire type 6 before byte 1). Export it again.\n",
    )
