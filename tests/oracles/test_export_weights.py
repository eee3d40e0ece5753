"""Every kind of weights that a decoder's ONNX may hold: what both runtimes make of it, beside transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from decoders import TOKENS, make_decoder, scores
from merging import done
from transformers import AutoModelForCausalLM

from lorasurgery.operations.running import by_genai, by_onnxruntime

# of the largest score; of integers, with x in float32
NEAR = {"fp32": 1e-5, "fp16": 5e-3, "int8": 2e-2}
LEVEL = {"int8": ("--accuracy-level", 1)}


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_decoder(tmp_path_factory.mktemp("weights") / "base", 2)


@pytest.mark.parametrize("kind", NEAR)
def test_both_runtimes_make_transformers_scores_and_text_with_their_cache(
    decoder: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    done("export", decoder, "-o", out, "--weights", kind, *LEVEL.get(kind, ()))
    onnx.checker.check_model(out / "model.onnx")
    want = scores(decoder)
    for run in (by_onnxruntime, by_genai):
        model = run.load(out)
        off = np.abs(model.logits(TOKENS) - want).max() / np.abs(want).max()
        assert off < NEAR[kind], off
        made = model.complete(TOKENS, 12)
        np.testing.assert_array_equal(made, greedy(decoder, 12))
        # whole texts are read at once here, and token by token with the cache there
        again = model.logits(np.concatenate([TOKENS, made]))[len(TOKENS) - 1 : -1]
        np.testing.assert_array_equal(again.argmax(-1), made)


def greedy(folder: Path, count: int) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.from_numpy(TOKENS)[None]
    found: np.ndarray = model.generate(given, max_new_tokens=count, do_sample=False)[0].numpy()
    return found[len(TOKENS) :]


def products(folder: Path) -> list[tuple[dict[str, int], int]]:
    """The attributes and the number of inputs of each MatMulNBits."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    return [({a.name: a.i for a in n.attribute}, sum(map(bool, n.input))) for n in nodes]


@pytest.mark.parametrize(
    ("provider", "flags", "level", "inputs"),
    [("cpu", (), 4, 3), ("cuda", ("--zero-points",), 0, 4)],
)
def test_products_take_x_as_the_provider_is_quickest_with(
    decoder: Path, tmp_path: Path, provider: str, flags: tuple[object, ...], level: int, inputs: int
) -> None:
    out = tmp_path / "out"
    done("export", decoder, "-o", out, "--weights", "int4", "--provider", provider, *flags)
    onnx.checker.check_model(out / "model.onnx")
    found = products(out)
    assert len(found) == 2 * 5 + 1
    for attributes, count in found:
        said = attributes["accuracy_level"], attributes["block_size"], attributes["bits"], count
        assert said == (level, 32, 4, inputs)
    config = json.loads((out / "genai_config.json").read_text())
    asked = config["model"]["decoder"]["session_options"]["provider_options"]
    assert [list(one) for one in asked] == ([["cuda"]] if provider == "cuda" else [])
    held = onnx.load(out / "model.onnx").graph.initializer
    types = {t.data_type for t in held if t.name.endswith(".scales")}
    half, whole = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    assert types == {half if provider == "cuda" else whole}
