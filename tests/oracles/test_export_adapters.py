"""Adapters as inputs of an exported graph: switched at run time, each computes what PEFT merges."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from decoders import TOKENS, make_decoder, scores
from merging import done, make_adapter, merged_by_peft, surgery
from tiny import Base
from transformers import AutoModelForCausalLM

from lorasurgery.operations.running import by_genai, by_onnxruntime

MODULES = {"one": ["q_proj", "v_proj", "down_proj"], "other": ["q_proj", "up_proj", "gate_proj"]}
RANKS = {"one": 3, "other": 5}


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """What the codes of an NF4 base stand for, and its export with two adapters of different ranks."""
    home = tmp_path_factory.mktemp("switched")
    done("quantize", make_decoder(home / "base"), "-o", home / "nf4")
    done("dequantize", home / "nf4", "-o", home / "plain", "--dtype", "float32")
    plain = Base(home / "plain", AutoModelForCausalLM, torch.float32)
    for seed, (name, modules) in enumerate(MODULES.items()):
        make_adapter(plain, home / name, seed=seed, target_modules=modules, r=RANKS[name])
    done(
        "export", home / "nf4", "-o", home / "out", "--weights", "nf4", "--adapters-as-inputs",
        "-a", home / "one", "-a", f"{home / 'other'}:0.5",
    )  # fmt: skip
    onnx.checker.check_model(home / "out" / "model.onnx")
    return plain, home / "out"


@pytest.mark.parametrize("runtime", [by_onnxruntime, by_genai])
def test_each_adapter_that_is_switched_on_is_its_merged_model(
    exported: tuple[Base, Path], runtime: object
) -> None:
    plain, out = exported
    seen = [scores(plain.path)]
    for name, weight in (("one", 1.0), ("other", 0.5)):
        merged = merged_by_peft(plain, (plain.path.with_name(name), weight))
        with torch.no_grad():
            seen.append(merged(torch.from_numpy(TOKENS)[None]).logits[0].numpy())
    files = [None, out / "adapters" / "one.onnx_adapter", out / "adapters" / "other.onnx_adapter"]
    for file, want in zip(files, seen, strict=True):
        got = runtime.load(out, file).logits(TOKENS)  # type: ignore[attr-defined]
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())
    assert min(np.abs(a - b).max() for a, b in pairwise(seen)) > 0.1


def test_the_manifest_names_inputs_and_ranks(exported: tuple[Base, Path]) -> None:
    _, out = exported
    content = json.loads((out / "adapters.json").read_text())
    assert list(content["adapters"]) == ["one", "other"]
    for name, facts in content["adapters"].items():
        assert (out / facts["file"]).is_file()
        assert set(facts["ranks"].values()) == {RANKS[name]}
        assert {module.rpartition(".")[2] for module in facts["ranks"]} == set(MODULES[name])
    down = "model.layers.1.mlp.down_proj"
    assert content["inputs"][f"{down}.lora_A.weight"] == {
        "dtype": "float32", "shape": [128, f"{down}.rank"],
    }  # fmt: skip
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    optional = {i.name for i in graph.input} & {t.name for t in graph.initializer}
    assert optional == set(content["inputs"])


def test_generate_switches_an_adapter_on_by_its_name(exported: tuple[Base, Path]) -> None:
    _, out = exported
    texts = {
        (name, runtime): json.loads(
            done(
                "generate", out, "w5 w9", "-n", 12, "--runtime", runtime, "--json",
                *(("--adapter", name) if name else ()),
            ).stdout
        )["answers"]["w5 w9"]
        for name in ("", "one", "other")
        for runtime in ("genai", "onnxruntime")
    }  # fmt: skip
    assert len(set(texts.values())) == 3
    for name in ("", "one", "other"):
        assert texts[name, "genai"] == texts[name, "onnxruntime"]
    result = surgery("generate", out, "w5", "--adapter", "third")
    assert (result.exit_code, result.stderr) == (
        1, f"error: {out}: has no adapter 'third' to switch on (one, other). Name one.\n",
    )  # fmt: skip


def test_what_can_be_no_input_is_refused_and_nothing_is_written(
    exported: tuple[Base, Path], tmp_path: Path
) -> None:
    plain, _ = exported
    out = tmp_path / "out"
    result = surgery("export", plain.path, "-o", out, "--adapters-as-inputs")
    assert (result.exit_code, result.stderr) == (
        2, "error: --adapters-as-inputs: there are none. Name some with --adapter.\n",
    )  # fmt: skip
    dora = make_adapter(plain, tmp_path / "dora", target_modules=["q_proj"], use_dora=True)
    result = surgery("export", plain.path, "-o", out, "--adapters-as-inputs", "-a", dora)
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {dora}: what its dora adds to model.layers.0.self_attn.q_proj is no product of two "
        "factors, which could be inputs. Convert it with `convert --to lora`, or merge it.\n",
    )
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dora"]
