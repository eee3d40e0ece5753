"""A merge into an ONNX model with --undo comes back byte for byte: the graph's file, and those beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as h
import pytest

from tests import onnx_files as made
from tests.test_onnx_merge import SHAPES, done, surgery, tensors


def beside(source: Path, target: Path, location: str) -> Path:
    """The same model with its data in another file, odd bytes before and after the weights."""
    onnx.save(
        onnx.load(source), target, save_as_external_data=True, location=location, size_threshold=0
    )
    data = target.parent / location
    data.write_bytes(data.read_bytes() + b"what no tensor is" * 9)
    return target


def old(source: Path, target: Path) -> Path:
    """Of IR version 3: initializers are inputs, and numbers are written one by one."""
    model = onnx.load(source)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        info = h.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(info)
        if tensor.name == "layer.0.key.weight":
            values = onnx.numpy_helper.to_array(tensor).ravel()
            tensor.ClearField("raw_data")
            tensor.float_data.extend(values)
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("kind", ["inside", "beside", "old"])
def test_every_file_of_the_base_comes_back(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "base"
    home.mkdir()
    base = made.chain(home / "m.onnx")
    if kind == "beside":
        base = beside(base, home / "e.onnx", "weights.bin")
    elif kind == "old":
        base = old(base, home / "o.onnx")
    adapter = made.adapter(tmp_path / "adapter", SHAPES)
    merged, undo = tmp_path / "merged.onnx", tmp_path / "u"
    done("merge", base, adapter, "-o", merged, "--undo", undo)
    onnx.checker.check_model(merged)
    before = {n: w for n, w in tensors(base).items() if n != "b"}
    assert all((tensors(merged)[n] != w).any() for n, w in before.items())
    out = tmp_path / "back" / "again.onnx"
    out.parent.mkdir()
    shown = json.loads(done("unmerge", merged, adapter, "-o", out, "--undo", undo, "--json").stdout)
    written = {f.name for f in out.parent.iterdir()} - {"again.onnx.surgery.json"}
    assert out.read_bytes() == base.read_bytes()
    if kind == "beside":
        assert (out.parent / "weights.bin").read_bytes() == (home / "weights.bin").read_bytes()
    assert written == ({"again.onnx", "weights.bin"} if kind == "beside" else {"again.onnx"})
    # of the numbers that are written one by one nothing is predicted
    weights = sum(np.prod(s) for m, s in SHAPES.items() if kind != "old" or m != "layer.0.key")
    assert shown["total"]["restored"] == weights
    # differences are mostly zeros
    if kind != "old":
        assert undo.stat().st_size < 0.5 * sum(w.nbytes for w in before.values())
    assert not list(tmp_path.glob("*.partial"))


def test_a_divided_weight_and_one_of_float16_come_back(tmp_path: Path) -> None:
    adapter = made.adapter(tmp_path / "a", {"layer.0.up": (64, 64), "layer.1.up": (64, 64)})
    w = made.drawn(64, 64).astype(np.float16)
    # two products of one weight and nothing else: the merged model has it no more
    nodes = [
        h.make_node("MatMul", ["x", "layer.0.up.weight"], ["h"], "/layer.0/up/MatMul"),
        h.make_node("Identity", ["layer.0.up.weight"], ["layer.1.up.weight"]),
        h.make_node("MatMul", ["h", "layer.1.up.weight"], ["y"], "/layer.1/up/MatMul"),
    ]
    shared = made.save(tmp_path / "s.onnx", nodes, {"layer.0.up.weight": w}, (64, 64))
    for base in (made.tied(tmp_path / "m.onnx"), shared):
        merged, undo, back = (tmp_path / f"{base.stem}.{s}.onnx" for s in ("m", "u", "b"))
        done("merge", base, f"{adapter}:0.5", "-o", merged, "--undo", undo)
        done("unmerge", merged, f"{adapter}:0.5", "-o", back, "--undo", undo)
        assert back.read_bytes() == base.read_bytes()
    assert w.tobytes() not in (tmp_path / "s.m.onnx").read_bytes()


def test_what_was_mapped_by_hand_needs_no_map_to_come_back(tmp_path: Path) -> None:
    base = tmp_path / "m.onnx"
    made.nameless(base)
    adapter = made.adapter(tmp_path / "a", {"up": (8, 8), "down": (8, 8)})
    (tmp_path / "map.yaml").write_text("up: second\ndown: one\n")
    out, undo, back = (tmp_path / name for name in ("o.onnx", "u", "b.onnx"))
    done("merge", base, adapter, "-o", out, "--map", tmp_path / "map.yaml", "--undo", undo)
    done("unmerge", out, adapter, "-o", back, "--undo", undo)
    assert back.read_bytes() == base.read_bytes()


# --- errors


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A merged model whose base has its data beside it, the adapter, and the undo file."""
    home = tmp_path / "base"
    home.mkdir()
    base = beside(made.chain(tmp_path / "m.onnx"), home / "e.onnx", "weights.bin")
    adapter = made.adapter(tmp_path / "adapter", SHAPES)
    done("merge", base, adapter, "-o", tmp_path / "o.onnx", "--undo", tmp_path / "u")
    return tmp_path / "o.onnx", adapter, tmp_path / "u"


def refused(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_another_adapter_and_another_model_are_named(merged: tuple[Path, Path, Path]) -> None:
    model, adapter, undo = merged
    out = model.with_name("back.onnx")
    assert refused("unmerge", model, f"{adapter}:0.5", "-o", out, "--undo", undo) == (
        1,
        f"error: {undo}: was written when {adapter}:1 was merged, but {adapter}:0.5 is not that. Name the "
        "same adapters, in the same order, with the same weights.\n",
    )  # fmt: skip
    base = model.parent / "base" / "e.onnx"
    assert refused("unmerge", base, adapter, "-o", out, "--undo", undo) == (
        3,
        f"error: {base}: onnx::MatMul_7 does not come back: its bytes differ from the base's. The "
        "merged weights were changed since, or another adapter was named.\n",
    )  # fmt: skip
    other = made.tied(model.with_name("other.onnx"))
    code, message = refused("unmerge", other, adapter, "-o", out, "--undo", undo)
    assert (code, message.split(": ", 2)[2]) == (
        1,
        "onnx::MatMul_7 is to be taken from it, but it has none like the base's. "
        f"{undo} was written for another merge.\n",
    )  # fmt: skip
    assert not out.exists()
    assert not out.with_name("weights.bin").exists()


def test_names_that_are_taken_are_refused(merged: tuple[Path, Path, Path]) -> None:
    model, adapter, undo = merged
    out = model.parent / "base" / "back.onnx"
    weights = out.with_name("weights.bin")
    before = weights.read_bytes()
    assert refused("unmerge", model, adapter, "-o", out, "--undo", undo) == (
        1,
        f"error: {weights}: the base has data in a file of this name, which exists. Name an output in "
        "another directory, or pass --overwrite.\n",
    )  # fmt: skip
    assert (out.exists(), weights.read_bytes()) == (False, before)
    done("unmerge", model, adapter, "-o", out, "--undo", undo, "--overwrite")
    assert weights.read_bytes() == before
    again = refused("merge", out, adapter, "-o", model.with_name("p.onnx"), "--undo", undo)
    assert again == (1, f"error: {undo}: exists. Pass --overwrite, or name another file.\n")


def test_a_merge_that_keeps_too_little_leaves_no_undo_file(tmp_path: Path) -> None:
    w = made.drawn(16, 24).astype(np.float16)
    base = made.save(
        tmp_path / "m.onnx", [h.make_node("MatMul", ["x", "up.weight"], ["y"])], {"up.weight": w}, (16, 24)
    )  # fmt: skip
    adapter = made.adapter(tmp_path / "a", {"up": (24, 16)})
    result = surgery(
        "merge", base, f"{adapter}:0.001", "-o", tmp_path / "p.onnx", "--undo", tmp_path / "u",
        "--min-retained", 0.999,
    )  # fmt: skip
    assert result.exit_code == 3
    assert {f.name for f in tmp_path.iterdir()} == {"m.onnx", "a"}


# --- Gemm either way


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("apart", [True, False])
def test_a_gemm_of_either_orientation_goes_through_every_operation(
    tmp_path: Path, turned: bool, apart: bool
) -> None:
    w, x = made.drawn(33, 70), made.drawn(4, 70)
    node = h.make_node("Gemm", ["x", "up.weight"], ["y"], "/up/Gemm", transB=int(not turned))
    held = {"up.weight": w.T.copy() if turned else w}
    base = made.save(tmp_path / "m.onnx", [node], held, (70, 33))
    if apart:
        base = beside(base, tmp_path / "e.onnx", "weights.bin")
    adapter = made.adapter(tmp_path / "a", {"up": (33, 70)})
    out, undo, back = tmp_path / "o.onnx", tmp_path / "u", tmp_path / "back" / "b.onnx"
    back.parent.mkdir()
    done("merge", base, adapter, "-o", out, "--undo", undo)
    want = x @ (w + made.delta(adapter, "up")).T
    np.testing.assert_allclose(made.run(out, x), want, rtol=1e-4, atol=1e-6)
    assert "verdict    holds" in done("verify", out, "--base", base, "-a", adapter).stdout
    done("unmerge", out, adapter, "-o", back, "--undo", undo)
    assert back.read_bytes() == base.read_bytes()
    done("quantize", out, "-o", tmp_path / "q.onnx", "--weights", "int8")
    onnx.checker.check_model(tmp_path / "q.onnx")
    near = made.run(tmp_path / "q.onnx", x)
    # a step is a 254th of a block's range, and rounding loses up to half of one
    assert np.linalg.norm(near - want) < 0.02 * np.linalg.norm(want)
