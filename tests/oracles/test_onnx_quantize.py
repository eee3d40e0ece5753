"""Quantized ONNX files, held to onnxruntime and to bitsandbytes' codes."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as h
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.errors import (
    FormatError,
    LoraSurgeryError,
    MatchError,
    OutputError,
    ValueRangeError,
)
from lorasurgery.export import _onnx_write
from lorasurgery.operations.quantize_onnx import OnnxQuantizeOptions, quantize_onnx
from lorasurgery.output import OutputOptions
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions
from tests import onnx_files as made

FLOAT = {"accuracy": 1}  # x as float32: products are then exact but for the order of sums


def quantize(source: Path, target: Path, weights: str = "nf4", **options: Any) -> Report:
    how = RunOptions(OutputOptions(overwrite=True))
    report = quantize_onnx(source, target, OnnxQuantizeOptions(weights, **options), how)
    onnx.checker.check_model(target)
    return report


def tensors(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(path)
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def bnb(w: np.ndarray, block: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes and scales of w [out, in] by bitsandbytes, and the values that they stand for.

    Its own dequantize_4bit is wrong on a CPU where the last block is short and rows end within blocks.
    """
    flat = torch.from_numpy(np.ascontiguousarray(w))
    packed, state = quantize_4bit(flat, blocksize=block, quant_type="nf4")
    codes, absmax = packed.numpy().ravel(), state.absmax.numpy()
    index = np.stack([codes >> 4, codes & 15], axis=-1).ravel()[: w.size]
    values = state.code.numpy()[index] * np.repeat(absmax, block)[: w.size]
    return codes, absmax, values.reshape(w.shape)


def unpacked(held: dict[str, np.ndarray], name: str, k: int) -> np.ndarray:
    """int4 as MatMulNBits' page defines it: (q - z) s, low nibble first."""
    b, scales = held[f"{name}.int4"].astype(np.int32), held[f"{name}.scales"]
    q = np.stack([b & 15, b >> 4], axis=-1).reshape(len(b), scales.shape[1], -1)
    z = np.full(scales.shape, 8)
    if f"{name}.zeros" in held:
        zeros = held[f"{name}.zeros"]
        z = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(b), -1)[:, : scales.shape[1]]
    return ((q - z[..., None]) * scales[..., None]).reshape(len(b), -1)[:, :k].astype(np.float32)


def product(x: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What tests.onnx_files.chain computes, weights [out, in]."""
    return (x @ q.T @ k.T + made.drawn(made.OUT)) @ v.T


WEIGHTS = {
    "onnx::MatMul_7": made.drawn(made.IN, made.MID).T, "layer.0.key.weight": made.drawn(made.OUT, made.MID),
    "layer.0.value.weight": made.drawn(50, made.OUT),
}  # fmt: skip


@pytest.mark.parametrize("block", [64, 32])
def test_nf4_is_bitsandbytes_bytes_and_runs_as_the_dequantized_product(
    tmp_path: Path, block: int
) -> None:
    out = tmp_path / "o.onnx"
    quantize(made.chain(tmp_path / "m.onnx"), out, block=block)
    held, values = tensors(out), []
    for name, w in WEIGHTS.items():
        codes, absmax, value = bnb(w, block)
        np.testing.assert_array_equal(held[f"{name}.nf4"], codes)
        np.testing.assert_array_equal(held[f"{name}.absmax"], absmax)
        values.append(value)
    assert set(held) == {f"{n}.{s}" for n in WEIGHTS for s in ("nf4", "absmax")} | {"b"}
    x = made.drawn(5, made.IN)
    np.testing.assert_allclose(made.run(out, x), product(x, *values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 16])
def test_int4_runs_as_the_dequantized_product_within_half_a_step(
    tmp_path: Path, symmetric: bool, block: int
) -> None:
    out = tmp_path / "o.onnx"
    quantize(
        made.chain(tmp_path / "m.onnx"), out, "int4", symmetric=symmetric, block=block, **FLOAT
    )
    held, values = tensors(out), []
    for name, w in WEIGHTS.items():
        value, scales = unpacked(held, name, w.shape[1]), np.abs(held[f"{name}.scales"])
        steps = np.repeat(scales, block, axis=1)[:, : w.shape[1]]
        # with zero points, rounding those moves the end of the range by up to half a step more
        worst = 0.5 if symmetric else 1.0
        # of the symmetric range -8..7, the far end is clipped by at most one step
        off = np.abs(value - w) / steps
        assert np.quantile(off, 0.9) <= worst + 1e-4
        assert off.max() <= 1 + 1e-4
        values.append(value)
    x = made.drawn(5, made.IN)
    np.testing.assert_allclose(made.run(out, x), product(x, *values), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_is_what_onnxruntime_makes_of_the_products_that_it_takes(
    tmp_path: Path, symmetric: bool
) -> None:
    """Of the three products it takes one: no Gemm, and no weight behind a Transpose."""
    path, out, name = made.chain(tmp_path / "m.onnx"), tmp_path / "o.onnx", "onnx::MatMul_7"
    theirs = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=symmetric)
    theirs.process()
    made_by = {t.name: onnx.numpy_helper.to_array(t) for t in theirs.model.model.graph.initializer}
    quantize(path, out, "int4", symmetric=symmetric)
    held, k = tensors(out), made.IN
    theirs_like = {
        f"{name}.int4": made_by[f"{name}_Q4"], f"{name}.scales": made_by[f"{name}_scales"],
    }  # fmt: skip
    if not symmetric:
        theirs_like[f"{name}.zeros"] = made_by[f"{name}_zero_points"]
    # beyond the end of a row nothing is asked of the codes
    np.testing.assert_array_equal(unpacked(held, name, k), unpacked(theirs_like, name, k))


def test_what_is_reported_is_what_was_lost(tmp_path: Path) -> None:
    out = tmp_path / "o.onnx"
    report = quantize(made.chain(tmp_path / "m.onnx"), out)
    assert [r.name for r in report.results] == ["layer.0.query", "layer.0.key", "layer.0.value"]
    for result, w in zip(report.results, WEIGHTS.values(), strict=True):
        lost = np.linalg.norm(bnb(w)[2] - w) / np.linalg.norm(w)
        assert result.metrics["relative_error"] == pytest.approx(lost, rel=1e-5)
    assert report.total["bytes"] == out.stat().st_size
    manifest = json.loads((tmp_path / "o.onnx.surgery.json").read_text())
    assert manifest["settings"]["weights"] == "nf4"
    assert set(manifest["tensors"]) == {"layer.0.query", "layer.0.key", "layer.0.value"}


def test_a_shared_initializer_is_packed_once_each_way_and_kept_for_its_lookup(
    tmp_path: Path,
) -> None:
    out, w = tmp_path / "o.onnx", made.drawn(64, 64)
    quantize(made.tied(tmp_path / "m.onnx"), out)
    held = tensors(out)
    np.testing.assert_array_equal(held["layer.0.up.weight"], w)
    (up, _, turned), (again, _, straight) = bnb(w.T), bnb(w)
    packed = [held[n] for n in held if n.startswith("layer.0.up.weight.nf4")]
    assert len(packed) == 2
    np.testing.assert_array_equal(packed, [up, again])
    x = made.drawn(5, 64)
    want = x @ turned.T @ straight.T + w[3]
    np.testing.assert_allclose(made.run(out, x), want, rtol=1e-4, atol=1e-5)


def test_float16_models_get_float16_scales(tmp_path: Path) -> None:
    half = h.make_tensor_value_info
    w = made.drawn(made.IN, 64).astype(np.float16)
    nodes = [h.make_node("MatMul", ["x", "w"], ["y"], "/up/MatMul")]
    graph = h.make_graph(
        nodes, "g", [half("x", 10, ["n", made.IN])], [half("y", 10, ["n", 64])],
        [onnx.numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    quantize(tmp_path / "m.onnx", tmp_path / "o.onnx", "int4", **FLOAT)
    held = tensors(tmp_path / "o.onnx")
    assert held["w.scales"].dtype == np.float16
    x = made.drawn(5, made.IN).astype(np.float16)
    want = x.astype(np.float32) @ unpacked(held, "w", made.IN).T
    got = made.run(tmp_path / "o.onnx", x).astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3)  # sums in float16


def test_an_old_model_whose_initializers_are_inputs_runs(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        info = h.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(info)
    onnx.save(model, path)
    quantize(path, tmp_path / "o.onnx")
    x = made.drawn(5, made.IN)
    want = product(x, *(bnb(w)[2] for w in WEIGHTS.values()))
    np.testing.assert_allclose(made.run(tmp_path / "o.onnx", x), want, rtol=1e-4, atol=1e-6)


def test_an_initializer_that_may_be_fed_is_left_alone(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    model = onnx.load(path)
    fed = h.make_tensor_value_info("onnx::MatMul_7", 1, [made.IN, made.MID])
    model.graph.input.append(fed)
    onnx.save(model, path)
    report = quantize(path, tmp_path / "o.onnx")
    assert [r.name for r in report.results] == ["layer.0.key", "layer.0.value"]


def test_bits_below_a_byte_and_unknown_fields_pass_untouched(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    model = onnx.load(path)
    for kind in (onnx.TensorProto.INT4, onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.UINT2):
        bits = 2 if kind == onnx.TensorProto.UINT2 else 4
        data = bytes(range(1, -(-21 * bits // 8) + 1))
        name = f"kept.{kind}"
        model.graph.initializer.append(h.make_tensor(name, kind, (3, 7), data, raw=True))
        model.graph.node.append(h.make_node("Identity", [name], [f"{name}.out"]))
    model.graph.initializer.append(h.make_tensor("words", 8, (2,), ["a", "b"]))
    model.graph.node.append(h.make_node("Identity", ["words"], ["words.out"]))
    model.metadata_props.add(key="who", value="me")
    onnx.save(model, path)
    # onnx's checker knows no Identity of these types
    how = RunOptions(OutputOptions(overwrite=True))
    quantize_onnx(path, tmp_path / "o.onnx", OnnxQuantizeOptions(), how)
    after = onnx.load(tmp_path / "o.onnx")
    assert after.metadata_props == model.metadata_props
    kept = {t.name: t for t in after.graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name.startswith(("kept", "words")):
            assert kept[tensor.name] == tensor


def test_data_beside_the_file_goes_beside_the_new_one(tmp_path: Path) -> None:
    whole = onnx.load(made.chain(tmp_path / "m.onnx"))
    source, out = tmp_path / "e.onnx", tmp_path / "out" / "o.onnx"
    onnx.save(whole, source, save_as_external_data=True, location="e.data", size_threshold=0)
    out.parent.mkdir()
    quantize(tmp_path / "m.onnx", tmp_path / "o.onnx")
    want = made.run(tmp_path / "o.onnx", x := made.drawn(5, made.IN))
    for files in ({"o.onnx.data"}, {"o.onnx.data.1"}):
        quantize(source, out)
        left = {f.name for f in out.parent.iterdir()} - {"o.onnx", "o.onnx.surgery.json"}
        assert left == files
        np.testing.assert_array_equal(made.run(out, x), want)


def test_more_than_two_gigabytes_are_streamed(tmp_path: Path) -> None:
    """A sparse weight file: holes take no room on the disk, and none in memory."""
    rows, columns = 9216, 65536
    nbytes, marks = 4 * rows * columns, made.drawn(3, 64)
    with (tmp_path / "m.data").open("wb") as file:
        os.truncate(file.fileno(), nbytes)
        for at, mark in zip((0, nbytes // 2, nbytes - 256), marks, strict=True):
            file.seek(at)
            file.write(mark.tobytes())
    tensor = onnx.TensorProto(name="table", data_type=1, dims=[rows, columns], data_location=1)
    for key, value in (("location", "m.data"), ("length", str(nbytes))):
        tensor.external_data.add(key=key, value=value)
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["y"], "/up/MatMul"),
        h.make_node("Gather", ["table", "at"], ["row"]),
    ]
    held = {"table": tensor, "w": made.drawn(64, 64), "at": np.array(5)}
    out = tmp_path / "o.onnx"
    peak = _peak_of(made.save(tmp_path / "m.onnx", nodes, held, (64, 64)), out)
    assert peak < 300 << 20  # bytes above what was there before
    onnx.checker.check_model(out)
    assert (tmp_path / "o.onnx.data").stat().st_size > 2 << 30
    file = open_checkpoint(out)
    table = file.read("table").reshape(-1)
    for at, mark in zip((0, table.size // 2, table.size - 64), marks, strict=True):
        np.testing.assert_array_equal(table[at : at + 64], mark)
        assert not table[at + 64 : at + 5000].any()
    np.testing.assert_array_equal(file.read("w.nf4"), bnb(made.drawn(64, 64).T)[0])


def _peak_of(source: Path, out: Path) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    quantize_onnx(source, out, OnnxQuantizeOptions(), RunOptions())
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_weight_that_a_branch_uses_too_is_kept_for_it(tmp_path: Path) -> None:
    """The subgraph of an If takes w from outside."""
    inner = h.make_graph(
        [h.make_node("Gather", ["w", "rows"], ["r"])], "inner", [],
        [h.make_tensor_value_info("r", 1, [1, 64])],
    )  # fmt: skip
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["h"], "/up/MatMul"),
        h.make_node("If", ["yes"], ["c"], then_branch=inner, else_branch=inner),
        h.make_node("Add", ["h", "c"], ["y"]),
    ]
    w = made.drawn(64, 64)
    held = {"w": w, "rows": np.array([7]), "yes": np.array(True)}
    path = made.save(tmp_path / "m.onnx", nodes, held, (64, 64))
    quantize(path, tmp_path / "o.onnx")
    x = made.drawn(3, 64)
    want = x @ bnb(w.T)[2].T + w[7]
    np.testing.assert_allclose(made.run(tmp_path / "o.onnx", x), want, rtol=1e-4, atol=1e-6)


# --- errors: one line, nothing written


def refused(kind: type[Exception], source: Path, out: Path, **options: Any) -> str:
    before = {f: f.stat().st_mtime_ns for f in out.parent.iterdir()}
    with pytest.raises(kind) as caught:
        quantize_onnx(source, out, OnnxQuantizeOptions(**options), RunOptions())
    assert {f: f.stat().st_mtime_ns for f in out.parent.iterdir()} == before
    return str(caught.value)


def test_a_graph_without_a_product_is_one_error(tmp_path: Path) -> None:
    path = made.save(tmp_path / "m.onnx", [h.make_node("Relu", ["x"], ["y"])], {}, (4, 4))
    assert refused(MatchError, path, tmp_path / "o.onnx") == (
        f"{path}: none of its 1 nodes is a MatMul or Gemm with a float matrix of its own that may be "
        "quantized (0 are left out by name). Export the weights as initializers, or name some with "
        "--include."
    )


def test_a_graph_that_uses_what_nothing_makes_is_refused(tmp_path: Path) -> None:
    nodes = [h.make_node("MatMul", ["x", "w"], ["y"], "/up/MatMul")]
    path = made.save(tmp_path / "m.onnx", nodes, {"v": made.drawn(4, 4)}, (4, 4))
    assert refused(FormatError, path, tmp_path / "o.onnx") == (
        f"{path}: /up/MatMul uses 'w', which nothing makes. Export it again."
    )


def test_no_flipped_byte_ends_in_a_traceback(tmp_path: Path) -> None:
    nodes = [
        h.make_node("Gemm", ["x", "k", "b"], ["h"], "/k/Gemm", transB=1),
        h.make_node("Transpose", ["v"], ["t"], perm=[1, 0]),
        h.make_node("MatMul", ["h", "t"], ["y"]),
    ]
    held = {"k": made.drawn(3, 4), "b": made.drawn(3), "v": made.drawn(4, 3)}
    path, out = made.save(tmp_path / "m.onnx", nodes, held, (4, 4)), tmp_path / "o.onnx"
    content, how = path.read_bytes(), RunOptions(OutputOptions(overwrite=True))
    survived = 0
    for at in range(len(content)):
        for value in (255, content[at] ^ 1):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                quantize_onnx(path, out, OnnxQuantizeOptions(), how)
                survived += 1
            except LoraSurgeryError:
                pass
    assert survived  # names and numbers may change


def test_patterns_that_match_nothing_are_named(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    assert refused(MatchError, path, tmp_path / "o.onnx", include=("*.nothing",)) == (
        f"{path}: no weight matches '*.nothing'. See `lorasurgery inspect -v`."
    )


def test_outputs_that_would_be_lost_are_refused(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    assert refused(OutputError, path, path) == f"{path}: is the input {path}. Name another output."
    other = made.tied(tmp_path / "other.onnx")
    assert refused(OutputError, path, other) == (
        f"{other}: exists. Pass --overwrite, or name another."
    )
    assert refused(OutputError, path, tmp_path / "o") == (
        f"{tmp_path / 'o'}: an ONNX model is written to a file. Name it o.onnx."
    )
    assert refused(OutputError, path, tmp_path) == (
        f"{tmp_path}: an ONNX model is written to a file. Name it {tmp_path.name}.onnx."
    )


def test_block_sizes_that_no_operator_takes_are_refused(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    assert refused(ValueRangeError, path, tmp_path / "o.onnx", block=48) == (
        "--block-size: 48 is none that MatMulBnb4 takes (16, 32, 64, 128, 256). Pass one of them."
    )


def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    w = made.drawn(8, 8)
    w[3, 4] = np.nan
    node = h.make_node("MatMul", ["x", "w"], ["y"], "/up/MatMul")
    path = made.save(tmp_path / "m.onnx", [node], {"w": w}, (8, 8))
    assert refused(ValueRangeError, path, tmp_path / "o.onnx") == (
        f"{path}: w holds values that are not finite. Leave it out with --exclude w."
    )


def test_external_data_of_a_constant_is_refused(tmp_path: Path) -> None:
    tensor = onnx.TensorProto(data_type=1, dims=[2], data_location=1)
    tensor.external_data.add(key="location", value="c.data")
    (tmp_path / "c.data").write_bytes(bytes(8))
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["h"], "/up/MatMul"),
        onnx.NodeProto(op_type="Constant", output=["c"]),
        h.make_node("Add", ["h", "c"], ["y"]),
    ]
    nodes[1].attribute.append(onnx.AttributeProto(name="value", type=4, t=tensor))
    path = made.save(tmp_path / "m.onnx", nodes, {"w": made.drawn(2, 2)}, (2, 2))
    assert refused(FormatError, path, tmp_path / "o.onnx") == (
        f"{path}: c belongs to a subgraph or a Constant, and has its data in another file. Export it "
        "with that data inline."
    )


def test_a_write_that_fails_leaves_the_old_model_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = made.chain(tmp_path / "m.onnx"), made.tied(tmp_path / "o.onnx")
    before = out.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_onnx_write.os, "replace", fail)
    with pytest.raises(OutputError) as caught:
        quantize(path, out)
    assert str(caught.value) == (
        f"{out}: the model cannot be written (No space left on device). Make room, or name another "
        "output."
    )
    assert out.read_bytes() == before
    assert not re.findall("partial", " ".join(f.name for f in tmp_path.iterdir()))
