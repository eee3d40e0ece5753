"""ONNX as a checkpoint: what the onnx package writes is read; what lies is refused, in one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.helper as h
import pytest

from lorasurgery.arrays import NUMPY
from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.errors import FormatError, ShapeError
from lorasurgery.formats import onnx as ours
from lorasurgery.operations.inspect import inspect
from tests import onnx_files as made

# all of onnx's types that hold numbers
KINDS = [k for k in onnx.TensorProto.DataType.values() if k not in (0, onnx.TensorProto.STRING)]


def model(path: Path, *tensors: onnx.TensorProto) -> Path:
    return made.save(path, [], {t.name: t for t in tensors}, (3, 3))


def error(path: Path) -> str:
    with pytest.raises(FormatError) as caught:
        ours.open(path)
    return str(caught.value)


def outside(path: Path, **entries: object) -> Path:
    """A model with one tensor of 16 floats, said to lie elsewhere."""
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[4, 4], data_location=1)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=str(value))
    return model(path, tensor)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False])
def test_every_type_is_read_as_the_onnx_package_reads_it(
    tmp_path: Path, kind: int, raw: bool
) -> None:
    values = np.array([[1, 0, 1], [1, 1, 1]])
    dtype = h.tensor_dtype_to_np_dtype(kind)
    if raw:
        tensor = onnx.numpy_helper.from_array(values.astype(dtype), "w")
    else:
        tensor = h.make_tensor("w", kind, (2, 3), values.astype(np.float32).flatten().tolist())
    assert tensor.HasField("raw_data") == raw
    file = ours.open(model(tmp_path / "m.onnx", tensor))
    want = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
    assert file.read("w").tobytes() == want
    assert file.storage("w")[1] == len(want)
    assert file.info("w").nbytes == len(want)
    if file.info("w").shape == (2, 3) and file.info("w").dtype in NUMPY:
        np.testing.assert_array_equal(file.read("w", 1, 2), values[1:2].astype(dtype))
    place = file.place("w")
    assert (place is not None) == raw
    if place:
        assert place[0].read_bytes()[place[1] :][: len(want)] == want


def test_rows_of_four_bits_are_not_taken_apart(tmp_path: Path) -> None:
    tensor = h.make_tensor("w", onnx.TensorProto.FLOAT4E2M1, (2, 3), bytes(3), raw=True)
    file = ours.open(model(tmp_path / "m.onnx", tensor))
    with pytest.raises(ShapeError, match=r"^w  F4 \[2, 3\]: rows may begin within a byte\. Read"):
        file.read("w", 1, 2)


def test_data_beside_the_file_is_mapped(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    whole = onnx.load(path)
    onnx.save(
        whole,
        tmp_path / "e.onnx",
        save_as_external_data=True,
        location="sub.data",
        size_threshold=0,
    )
    inside, beside = ours.open(path), open_checkpoint(tmp_path / "e.onnx")
    assert set(inside) == set(beside)
    for name in inside:
        np.testing.assert_array_equal(inside.read(name, 2, 9), beside.read(name, 2, 9))
        assert beside.place(name)[0] == tmp_path / "sub.data"
        beside.release(name)


def test_strings_are_refused_when_they_are_read(tmp_path: Path) -> None:
    tensor = h.make_tensor("words", onnx.TensorProto.STRING, (1,), ["one"])
    path = model(tmp_path / "m.onnx", tensor)
    with pytest.raises(FormatError) as caught:
        ours.open(path).read("words")
    assert str(caught.value) == f"{path}: words holds strings, no numbers. Leave it out."


@pytest.mark.parametrize("location", ["../x", "/etc/passwd", "", "a/../../x", "m.onnx", "a\nb"])
def test_data_outside_of_the_directory_is_refused(tmp_path: Path, location: str) -> None:
    path = outside(tmp_path / "m.onnx", location=location)
    assert error(path) == (
        f"{path}: w: its data is said to be in {location!r}, which is no file below {tmp_path}. "
        "Export it again."
    )


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "model"
    home.mkdir()
    (tmp_path / "secret").write_bytes(bytes(64))
    (home / "w.data").symlink_to(tmp_path / "secret")
    path = outside(home / "m.onnx", location="w.data")
    assert error(path) == (
        f"{home / 'w.data'}: is a link out of the directory, to {tmp_path / 'secret'}. Replace the "
        "link by the file."
    )


def test_missing_and_short_data_is_named(tmp_path: Path) -> None:
    path = outside(tmp_path / "m.onnx", location="w.data", offset=8)
    assert error(path) == f"{path}: w: its data file w.data is missing. Put it beside the model."
    (tmp_path / "w.data").write_bytes(bytes(64))
    assert error(path) == (
        f"{path}: w: bytes 8 to 72 of w.data are its data, but that has 64 bytes. Copy the file anew."
    )
    path = outside(tmp_path / "m.onnx", location="w.data", offset=0, length=60)
    assert error(path) == (
        f"{path}: w: is FLOAT [4, 4], 64 bytes, but 60 are stored. Export it again."
    )
    for odd in ("-4", "4e1", "9" * 30):
        path = outside(tmp_path / "m.onnx", location="w.data", offset=odd)
        assert error(path) == (
            f"{path}: w: its offset is {odd!r}, no number of bytes. Export it again."
        )


def test_overlapping_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(128))
    tensors = []
    for name, offset in (("a", 0), ("b", 0), ("c", 60)):
        tensor = onnx.TensorProto(name=name, data_type=1, dims=[4, 4], data_location=1)
        tensor.external_data.add(key="location", value="w.data")
        tensor.external_data.add(key="offset", value=str(offset))
        tensors.append(tensor)
    assert len(ours.open(model(tmp_path / "same.onnx", *tensors[:2]))) == 2
    path = model(tmp_path / "m.onnx", *tensors[1:])
    assert error(path) == (
        f"{path}: the data of b and of c overlap in w.data, at byte 60. Export it again."
    )


def test_tensors_that_lie_about_themselves_are_named(tmp_path: Path) -> None:
    path = model(tmp_path / "a.onnx", onnx.TensorProto(name="w", data_type=1, dims=[4]))
    assert error(path) == f"{path}: w: has [4] elements and no data. Export it again."
    path = model(tmp_path / "b.onnx", onnx.TensorProto(name="w", data_type=99, dims=[4]))
    assert error(path) == f"{path}: w: type 99 with shape [4] is no tensor. Export it again."
    path = model(tmp_path / "c.onnx", onnx.TensorProto(name="w", data_type=1, dims=[-4]))
    assert error(path) == f"{path}: w: type 1 with shape [-4] is no tensor. Export it again."
    raw = onnx.TensorProto(name="w", data_type=1, dims=[4], raw_data=bytes(12))
    path = model(tmp_path / "d.onnx", raw)
    assert error(path) == f"{path}: w: is FLOAT [4], 16 bytes, but 12 are stored. Export it again."


def test_every_beginning_of_a_file_is_refused_and_no_flipped_byte_ends_in_a_traceback(
    tmp_path: Path,
) -> None:
    whole = made.chain(tmp_path / "m.onnx").read_bytes()[:]
    path = tmp_path / "cut.onnx"
    small = model(tmp_path / "s.onnx", onnx.numpy_helper.from_array(made.drawn(3, 3), "w"))
    content = small.read_bytes()
    path.write_bytes(b"")
    assert error(path) == f"{path}: is empty. Copy it anew."
    for length in (1, 5, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        assert re.fullmatch(
            rf"{path}: is no whole ONNX file \(.+\)\. Export it again\.", error(path)
        )
    for at in range(len(content)):
        for value in (0, 255, content[at] ^ 1):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            try:
                file = ours.open(path)
                [file.read(name) for name in file]
            except FormatError:
                pass


def test_a_header_is_read_without_numpy_and_onnx(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "m.onnx")
    code = (
        "import sys; from lorasurgery.operations.inspect import inspect; "
        f"inspect({str(path)!r}); print([m for m in ('numpy', 'onnx', 'torch') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_inspect_tells_graph_and_initializers(tmp_path: Path) -> None:
    found = inspect(str(made.chain(tmp_path / "m.onnx", producer_name="by hand")))
    assert found.format == "onnx"
    assert found.graph == {
        "producer": "by hand", "ir_version": 8, "opsets": {"ai.onnx": 17},
        "inputs": {"x": "FLOAT [n, 70]"}, "outputs": {"y": "FLOAT [n, 50]"},
        "operators": {"MatMul": 2, "Gemm": 1, "Transpose": 1}, "linear_weights": 3,
        "quantized_products": {}, "external_files": [], "sparse_initializers": 0,
    }  # fmt: skip
    assert [(row.name, row.shape) for row in found.tensors] == [
        ("b", (33,)), ("layer.0.key.weight", (33, 96)), ("layer.0.value.weight", (50, 33)),
        ("onnx::MatMul_7", (70, 96)),
    ]  # fmt: skip


def test_a_directory_whose_weights_are_a_graph_is_inspected(tmp_path: Path) -> None:
    path = made.chain(tmp_path / "model.onnx")
    (tmp_path / "config.json").write_text("{}")
    assert inspect(str(tmp_path)) == inspect(str(path))
