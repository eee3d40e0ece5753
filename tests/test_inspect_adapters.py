"""inspect of layouts whose tensors' names alone do not tell what they are: our own, and ONNX Runtime's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from algebra import cli, facts, fails
from handmade import llama
from onnxruntime import AdapterFormat, OrtValue
from small import adapter, base

from lorasurgery.dialects import ort_adapter


def test_our_own_layout_is_told_by_its_description(tmp_path: Path) -> None:
    old, lora = base(tmp_path / "base"), adapter(tmp_path / "lora")
    out = tmp_path / "delta"
    facts("convert", lora, "-o", out, "--to", "delta_lora", "--base", old)
    found = facts("inspect", out)
    assert found["format"] == "safetensors"
    assert found["adapter"] == {
        "layout": "surgery", "variant": "delta_lora", "rank_stabilized": False, "ranks": {"3": 6},
        "alphas": [3.0], "modules": 6, "targets": ["down_proj", "q_proj", "up_proj"],
        "modules_to_save": [], "base": "made/by-hand",
    }  # fmt: skip
    assert len(found["tensors"]) == 6 * 4
    assert found["surgery"]["operation"] == "convert"
    code, stdout, _ = cli("inspect", out)
    assert code == 0
    assert "delta_lora, surgery layout" in stdout


@pytest.mark.parametrize("name", ["", "adapter.onnx_adapter"], ids=["directory", "file"])
def test_an_onnx_adapter_is_told_by_its_parameters(tmp_path: Path, name: str) -> None:
    made = llama()
    ort_adapter.write(made, tmp_path)
    found = facts("inspect", tmp_path / name)
    assert (found["format"], found["files"]) == ("onnx_adapter", 1)
    assert found["adapter"] == {
        "layout": "ort_adapter", "variant": "lora", "rank_stabilized": False,
        "ranks": {"2": 1, "3": 3, "4": 1}, "alphas": [2.0, 3.0, 4.0], "modules": 5,
        "targets": ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"], "modules_to_save": [],
        "base": None,
    }  # fmt: skip
    shown = {row["name"]: (row["dtype"], row["shape"]) for row in found["tensors"]}
    # A [in, r] and B [r, out], as x meets them
    assert shown["model.layers.1.mlp.up_proj.lora_A.weight"] == ("F32", [16, 3])
    assert shown["model.layers.1.mlp.up_proj.lora_B.weight"] == ("F32", [3, 24])
    numbers = sum(a * b for _, (a, b) in shown.values())
    assert (found["parameters"], found["nbytes"]) == (numbers, 4 * numbers)


def test_what_an_onnx_adapter_holds_beside_factors_is_shown(tmp_path: Path) -> None:
    made, file = AdapterFormat(), tmp_path / "x.onnx_adapter"
    arrays = {
        "q.lora_A.weight": np.ones((4, 2), np.float16), "q.lora_B.weight": np.ones((2, 3), "f2"),
        "steps": np.ones(2, np.int64),
    }  # fmt: skip
    made.set_parameters({n: OrtValue.ortvalue_from_numpy(a) for n, a in arrays.items()})
    made.export_adapter(str(file))
    found = facts("inspect", file)
    assert {row["name"]: row["dtype"] for row in found["tensors"]} == {
        "q.lora_A.weight": "F16", "q.lora_B.weight": "F16", "steps": "I64",
    }  # fmt: skip
    assert found["adapter"]["modules"] == 1


def test_a_broken_one_is_an_error_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.onnx_adapter"
    file.write_bytes(b"\x08\0\0\0TORT" + b"\xff" * 40)
    code, message = fails("inspect", file)
    assert code == 1
    assert message.startswith(f"{file}: onnxruntime cannot read it (")
    assert message.endswith("). Restore the file.")
    out = tmp_path / "own"
    out.mkdir()
    (out / "adapter.json").write_text(json.dumps({"format": "lorasurgery-adapter", "version": 9}))
    (out / "adapter.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    assert fails("inspect", out) == (
        1, f"{out / 'adapter.json'}: version 9, but 1 is read here. Take a newer lorasurgery.",
    )  # fmt: skip
