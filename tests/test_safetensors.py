"""safetensors: the format's own library as the oracle, and every header that lies named in one line."""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.arrays import NUMPY
from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.errors import FormatError, ShapeError
from lorasurgery.formats import safetensors as ours
from lorasurgery.formats._writer import Writer, lay_out
from lorasurgery.tensors import BITS, TensorInfo

# the library's own names of dtypes, for those that it writes
LIBRARY = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
SHAPES = ((3, 8), (16,), (), (0,), (2, 0, 3), (1, 1, 2, 4))


def entry(
    dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw(header: object, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """A file from its parts, so that each of them can lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def put(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def write(
    folder: Path, tensors: Mapping[TensorInfo, bytes], metadata: Mapping[str, str] | None = None
) -> Path:
    """A file by the streaming writer, its tensors given last first."""
    (shard,) = lay_out(tensors, 1 << 60, metadata or {})
    writer = Writer(folder, shard, resume=False)
    for info, data in reversed(tensors.items()):
        writer.write(info.name, 0, np.frombuffer(data, np.uint8))
    writer.close()
    return writer.path


def drawn(dtype: str, shape: tuple[int, ...], seed: int = 0) -> tuple[TensorInfo, bytes]:
    info = TensorInfo(f"{dtype}.{'x'.join(map(str, shape))}", dtype, shape)
    data = np.random.default_rng(seed).integers(0, 256, info.nbytes, np.uint8)
    return info, (data & 1 if dtype == "BOOL" else data).tobytes()


def whole_bytes(dtype: str, shape: tuple[int, ...]) -> bool:
    return int(np.prod(shape)) * BITS[dtype] % 8 == 0


ALL = dict(drawn(d, s, i) for i, d in enumerate(BITS) for s in SHAPES if whole_bytes(d, s))


# --- the library as the oracle


def test_the_dtypes_that_are_known_are_those_of_the_library() -> None:
    with pytest.raises(safetensors.SafetensorError) as error:
        safetensors.deserialize(raw({"w": entry("NEW")}))
    listed = str(error.value).partition("expected one of ")[2].partition(" at line")[0]
    assert {name.strip("`") for name in listed.split(", ")} == set(BITS)


def test_the_library_reads_every_dtype_and_shape_that_is_written(tmp_path: Path) -> None:
    read = dict(safetensors.deserialize(write(tmp_path, ALL, {"format": "pt"}).read_bytes()))
    assert {
        TensorInfo(name, t["dtype"], tuple(t["shape"])): bytes(t["data"])
        for name, t in read.items()
    } == ALL


def test_every_dtype_that_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {i: d for i, d in ALL.items() if i.dtype in LIBRARY}
    kept = {i: np.frombuffer(d, np.uint8) for i, d in tensors.items()}
    specs = {
        i.name: safetensors.TensorSpec(
            dtype=LIBRARY[i.dtype], shape=i.shape, data_ptr=d.ctypes.data, data_len=d.nbytes
        )
        for i, d in kept.items()
    }
    file = ours.open(put(tmp_path, safetensors.serialize(specs, {"by": "the library"})))
    assert file.metadata == {"by": "the library"}
    assert {file.info(name): file.read(name).tobytes() for name in file} == tensors
    for name in file:
        assert file.read(name).dtype == NUMPY[file.info(name).dtype]
        assert file.read(name).shape == file.info(name).shape


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_dtypes_below_a_byte_come_as_their_bytes(tmp_path: Path, dtype: str) -> None:
    info, data = drawn(dtype, (3, 8))
    file = ours.open(write(tmp_path, {info: data}))
    assert file.read(info.name).dtype == np.uint8
    assert file.read(info.name).tobytes() == data
    row = len(data) // 3
    assert file.read(info.name, 1, 3).tobytes() == data[row:]


def test_rows_that_begin_within_a_byte_are_refused(tmp_path: Path) -> None:
    info, data = drawn("F4", (2, 3))
    file = ours.open(write(tmp_path, {info: data}))
    with pytest.raises(ShapeError) as error:
        file.read(info.name, 1, 2)
    assert str(error.value) == (
        "F4.2x3  F4 [2, 3]: row 1 or 2 begins within a byte. Read the tensor whole."
    )


def test_names_and_metadata_may_be_in_any_script(tmp_path: Path) -> None:
    name = "слой.重み.🧠 'quoted' \"twice\" \\ back"
    info = TensorInfo(name, "U8", (2,))
    path = write(tmp_path, {info: b"ab"}, {"ключ": "値\n🙂"})
    with safetensors.safe_open(path, "np") as peer:
        assert peer.keys() == [name]
        assert peer.metadata() == {"ключ": "値\n🙂"}
    assert ours.open(path).metadata == {"ключ": "値\n🙂"}
    assert ours.open(path).read(name).tobytes() == b"ab"


def test_every_tensor_starts_at_a_multiple_of_its_item(tmp_path: Path) -> None:
    infos = {TensorInfo(d, d, (1,)): bytes(BITS[d] // 8) for d in reversed(BITS) if BITS[d] >= 8}
    file = ours.open(write(tmp_path, infos))
    for name in file:
        _, at = file.place(name) or (None, 1)
        assert at % (BITS[name] // 8) == 0, name


def test_a_file_of_no_tensors_is_a_checkpoint_of_none(tmp_path: Path) -> None:
    assert list(ours.open(put(tmp_path, raw({}, b"")))) == []
    assert list(ours.open(put(tmp_path, raw({"__metadata__": None}, b"")))) == []


def test_rows_are_read_as_numpy_slices_them(tmp_path: Path) -> None:
    w = np.arange(40, dtype=np.float32).reshape(10, 4)
    file = ours.open(write(tmp_path, {TensorInfo("w", "F32", (10, 4)): w.tobytes()}))
    for start, stop in ((0, None), (3, 7), (8, 99), (99, 200), (-3, None), (5, 5), (7, 2)):
        np.testing.assert_array_equal(file.read("w", start, stop), w[start:stop])


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_a_tensor_at_an_odd_address_is_read_right_and_by_rows(tmp_path: Path, shift: int) -> None:
    w = np.arange(12, dtype=np.float32).reshape(4, 3)
    header = json.dumps({"w": entry("F32", [4, 3], [0, 48])}).encode()
    header += b" " * (-(8 + len(header)) % 8 + shift)
    file = ours.open(put(tmp_path, raw(header, w.tobytes())))
    got = file.read("w", 1, 3)
    np.testing.assert_array_equal(got, w[1:3])
    assert got.flags.aligned
    assert got.nbytes == 24


def test_what_is_read_cannot_be_written(tmp_path: Path) -> None:
    file = ours.open(write(tmp_path, dict([drawn("F32", (3, 8))])))
    with pytest.raises(ValueError, match="read-only"):
        file.read("F32.3x8")[0, 0] = 1


def test_released_tensors_can_be_read_again(tmp_path: Path) -> None:
    tensors = dict(drawn("F32", (n, 1000), n) for n in range(1, 9))
    file = ours.open(write(tmp_path, tensors))
    for info, data in tensors.items():
        before = file.read(info.name)
        file.release(info.name)
        assert before.tobytes() == data
    assert {file.info(n): file.read(n).tobytes() for n in file} == tensors


# --- headers that lie

U8 = {"w": entry()}


def impossible(shape: object, offsets: object = "[0, 4]") -> str:
    return f"w: shape {shape} with offsets {offsets} is impossible. Restore the file."


SHORT = "The file is cut short, or no safetensors file."
LIES: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", f"the header claims 0 bytes of a file of 0. {SHORT}"),
    "less than a length": (b"\x02\0\0", f"the header claims 2 bytes of a file of 3. {SHORT}"),
    "a length and nothing": (bytes(8), f"the header claims 0 bytes of a file of 8. {SHORT}"),
    "header longer than the file": (
        raw(U8, length=5000), f"the header claims 5000 bytes of a file of 72. {SHORT}"
    ),
    "header of 2^64 - 1 bytes": (
        raw(U8, length=2**64 - 1), f"the header claims {2**64 - 1} bytes of a file of 72. {SHORT}"
    ),
    "another kind of file": (
        b"PK\x03\x04" + bytes(60), f"the header claims 67324752 bytes of a file of 64. {SHORT}"
    ),
    "cut header": (
        raw(b'{"w": ['),
        "the header is no valid JSON (Expecting value: line 1 column 8 (char 7)). Restore the file.",
    ),
    "not UTF-8": (
        raw(b'{"\xff":1}'),
        "the header is no valid JSON ('utf-8' codec can't decode byte 0xff in position 2: invalid "
        "start byte). Restore the file.",
    ),
    "UTF-16": (
        raw(json.dumps(U8).encode("utf-16")),
        "the header is no valid JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid "
        "start byte). Restore the file.",
    ),
    "deep nesting": (
        raw(b'{"w":' + b"[" * 100_000),
        "the header nests too deep. Restore the file.",
    ),
    "an endless number": (
        raw(b'{"w":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}'),
        "the header is no valid JSON (Exceeds the limit (4300 digits) for integer string conversion: "
        "value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit). "
        "Restore the file.",
    ),
    "a list": (raw([1, 2]), "the header is no JSON object. Restore the file."),
    "a name twice": (
        raw(b'{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
            b'"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
        "the header is no valid JSON ('w' stands in it 2 times). Restore the file.",
    ),
    "a key twice in an entry": (
        raw(b'{"w":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}'),
        "the header is no valid JSON ('dtype' stands in it 2 times). Restore the file.",
    ),
    "metadata of numbers": (
        raw({"__metadata__": {"a": 1}, **U8}),
        "__metadata__ is no object of strings: {'a': 1}. Restore the file.",
    ),
    "metadata that is a list": (
        raw({"__metadata__": ["a"], **U8}),
        "__metadata__ is no object of strings: ['a']. Restore the file.",
    ),
    "a name of two lines": (
        raw({"a\nb\x1b[31m": entry()}),
        "the name 'a\\nb\\x1b[31m' holds control characters or half a surrogate pair. "
        "Restore the file.",
    ),
    "half a surrogate pair": (
        raw(b'{"\\ud800":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}'),
        "the name '\\ud800' holds control characters or half a surrogate pair. Restore the file.",
    ),
    "an entry that is a list": (
        raw({"w": [1]}),
        "w: the header entry lacks dtype, shape or data_offsets. Restore the file.",
    ),
    "an entry without a shape": (
        raw({"w": {"dtype": "U8", "data_offsets": [0, 4]}}),
        "w: the header entry lacks dtype, shape or data_offsets. Restore the file.",
    ),
    "an unknown dtype": (
        raw({"w": entry("I4")}), f"w: unknown dtype 'I4'. Known: {', '.join(BITS)}."
    ),
    "a dtype that is a list": (
        raw({"w": entry(["U8"])}), f"w: unknown dtype ['U8']. Known: {', '.join(BITS)}."
    ),
    "a negative shape": (raw({"w": entry(shape=[-4])}), impossible("[-4]")),
    "negative shapes whose product is right": (raw({"w": entry(shape=[-2, -2])}), impossible("[-2, -2]")),
    "a shape of a float": (raw({"w": entry(shape=[4.0])}), impossible("[4.0]")),
    "a shape of a bool": (raw({"w": entry(shape=[True, 4])}), impossible("[True, 4]")),
    "a shape of a string": (raw({"w": entry(shape=["4"])}), impossible("['4']")),
    "a shape that is a string": (raw({"w": entry(shape="4")}), impossible("'4'")),
    "a shape that is an object": (raw({"w": entry(shape={})}), impossible("{}")),
    "a shape of nan": (raw({"w": entry(shape=[float("nan")])}), impossible("[nan]")),
    "a shape that overflows 64 bits": (
        raw({"w": entry(shape=[2**32, 2**32])}), impossible("[4294967296, 4294967296]")
    ),
    "an empty tensor of huge dimensions": (
        raw({"w": entry(shape=[0, 2**62], offsets=[0, 0])}),
        impossible("[0, 4611686018427387904]", "[0, 0]"),
    ),
    "more dimensions than an array has": (
        raw({"w": entry(shape=[1] * 65, offsets=[0, 1])}),
        impossible(f"[{'1, ' * 25} ...", "[0, 1]"),
    ),
    "a negative offset": (raw({"w": entry(offsets=[-4, 0])}), impossible("[4]", "[-4, 0]")),
    "one offset": (raw({"w": entry(offsets=[4])}), impossible("[4]", "[4]")),
    "three offsets": (raw({"w": entry(offsets=[0, 4, 8])}), impossible("[4]", "[0, 4, 8]")),
    "no offsets": (raw({"w": entry(offsets=None)}), impossible("[4]", "None")),
    "offsets back to front": (
        raw({"w": entry(offsets=[4, 0])}),
        "w: U8 [4] takes 4 bytes, but the header gives it -4. Restore the file.",
    ),
    "fewer bytes than the shape takes": (
        raw({"w": entry("F32", [4], [0, 4])}),
        "w: F32 [4] takes 16 bytes, but the header gives it 4. Restore the file.",
    ),
    "half a byte": (
        raw({"w": entry("F4", [7], [0, 4])}), "w: F4 [7] ends within a byte. Restore the file."
    ),
    "overlapping tensors": (
        raw({"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])}, bytes(6)),
        "b starts at byte 2 and overlaps a, which ends at 4. Restore the file.",
    ),
    "two tensors in one place": (
        raw({"a": entry(), "b": entry()}),
        "b starts at byte 0 and overlaps a, which ends at 4. Restore the file.",
    ),
    "a gap": (
        raw({"a": entry(offsets=[0, 4]), "b": entry(offsets=[6, 10])}, bytes(10)),
        "b starts at byte 6 and leaves a gap after a, which ends at 4. Restore the file.",
    ),
    "a gap at the start": (
        raw({"a": entry(offsets=[2, 6])}, bytes(6)),
        "a starts at byte 2 and leaves a gap after the header, which ends at 0. Restore the file.",
    ),
    "data cut short": (
        raw(U8, bytes(3)),
        "the tensors take 4 bytes, but the file holds 3: it is cut short. Restore the file.",
    ),
    "bytes past the end": (
        raw(U8, bytes(7)),
        "the tensors take 4 bytes, but the file holds 7: it has bytes that no tensor owns. "
        "Restore the file.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_one_line_that_says_how(tmp_path: Path, lie: str) -> None:
    content, message = LIES[lie]
    path = put(tmp_path, content)
    with pytest.raises(FormatError) as error:
        ours.open(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_header_above_the_formats_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:  # sparse: it takes no room
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(200_000_000)
    with pytest.raises(FormatError) as error:
        ours.open(path)
    assert str(error.value) == (
        f"{path}: the header claims 100000001 bytes of a file of 200000000. {SHORT}"
    )


def test_a_file_that_the_disk_does_not_give_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.symlink_to("/proc/self/mem")  # address 0 is mapped nowhere: a true input/output error
    with pytest.raises(FormatError) as error:
        ours.open(path)
    assert str(error.value) == f"{path}: Input/output error. Check the file."


def test_a_directory_of_a_files_name_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(FormatError) as error:
        ours.open(path)
    assert str(error.value) == f"{path}: Is a directory. Check the file."


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    with pytest.raises(FormatError) as error:
        open_checkpoint(path)
    assert str(error.value) == f"{path}: is no regular file. Check the path."


def test_a_file_that_shrinks_while_it_is_read_is_one_line_and_no_crash(tmp_path: Path) -> None:
    info = TensorInfo("w", "U8", (1 << 20,))
    path = write(tmp_path, {info: bytes(1 << 20)})
    file, size = ours.open(path), path.stat().st_size
    file.read("w", 0, 10)
    os.truncate(path, 4096)
    with pytest.raises(FormatError) as error:
        file.read("w", 500_000, 500_010)
    assert str(error.value) == (
        f"{path}: w: the file shrank from {size} to 4096 bytes while it was read. Restore the file."
    )


def test_a_file_that_changes_between_header_and_data_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path, dict([drawn("F32", (3, 8))]))
    file, size = ours.open(path), path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(FormatError) as error:
        file.read("F32.3x8")
    assert str(error.value) == (
        f"{path}: F32.3x8: the file had {size} bytes when it was opened, and has {size - 1} now. "
        "Leave it alone, and begin again."
    )


def test_a_file_that_is_replaced_is_read_on_as_it_was(tmp_path: Path) -> None:
    info, data = drawn("F32", (3, 8))
    path = write(tmp_path, {info: data})
    file = ours.open(path)
    file.read(info.name)
    put(tmp_path, b"", "other").replace(path)
    assert file.read(info.name).tobytes() == data


def test_a_name_that_the_format_keeps_for_itself_is_not_written() -> None:
    with pytest.raises(FormatError) as error:
        lay_out([TensorInfo("__metadata__", "U8", (1,))], 1 << 30, {})
    assert str(error.value) == (
        "__metadata__  U8 [1]: safetensors has no room for a tensor of this name. Rename it."
    )


# --- properties

names = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=20)
shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[TensorInfo, bytes]:
    found = {}
    for name in draw(st.sets(names.filter(lambda n: n != "__metadata__"), max_size=8)):
        dtype, shape = draw(st.sampled_from(list(BITS))), draw(shapes)
        shape = shape if whole_bytes(dtype, shape) else (*shape, 8)
        info = TensorInfo(name, dtype, shape)
        found[info] = draw(st.binary(min_size=info.nbytes, max_size=info.nbytes))
    return found


@settings(max_examples=100, deadline=None)
@given(tensor_sets(), st.dictionaries(names, names, max_size=3))
def test_any_tensors_come_back_from_a_file_and_from_the_library(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[TensorInfo, bytes],
    metadata: dict[str, str],
) -> None:
    path = write(tmp_path_factory.mktemp("any"), tensors, metadata)
    file = ours.open(path)
    assert {file.info(n): file.read(n).tobytes() for n in file} == tensors
    assert file.metadata == metadata
    peer = dict(safetensors.deserialize(path.read_bytes()))
    assert {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in peer.items()} == {
        i.name: (i.dtype, i.shape, data) for i, data in tensors.items()
    }


WHOLE = raw(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", [2, 3], [0, 24]),
     "b.weight": entry("F4", [4], [24, 26]), "c": entry("BF16", [], [26, 28])},
    bytes(range(28)),
)  # fmt: skip
SPLICES = (
    b"",
    b'"',
    b"[",
    b"{",
    b"-",
    b"e9",
    b"0",
    b"9" * 20,
    b"null",
    b"true",
    b'"U8"',
    b"\\ud800",
)


@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, len(WHOLE) - 28),
    st.integers(0, 12),
    st.one_of(st.sampled_from(SPLICES), st.binary(max_size=8)),
    st.booleans(),
)
def test_a_damaged_header_is_an_error_of_the_format_or_a_file_that_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, splice: bytes, mend: bool
) -> None:
    """`mend` sets the length right again, so that the damage reaches the JSON."""
    content = WHOLE[:at] + splice + WHOLE[at + cut :]
    if mend and len(content) > 36:
        content = struct.pack("<Q", len(content) - 36) + content[8:]
    path = put(tmp_path_factory.getbasetemp(), content, "damaged.safetensors")
    try:
        file = ours.open(path)
    except FormatError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
        return
    peer = dict(safetensors.deserialize(content))
    assert {n: file.read(n).tobytes() for n in file} == {
        n: bytes(t["data"]) for n, t in peer.items()
    }


def test_threads_read_one_file_together(tmp_path: Path) -> None:
    tensors = dict(drawn("F32", (n, 999), n) for n in range(1, 20))
    file = ours.open(write(tmp_path, tensors))
    wrong = []

    def work() -> None:
        for info, data in tensors.items():
            if file.read(info.name).tobytes() != data:
                wrong.append(info.name)
            file.release(info.name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_bfloat16_is_read_as_ml_dtypes_has_it(tmp_path: Path) -> None:
    w = np.linspace(-3, 3, 12).astype(ml_dtypes.bfloat16).reshape(3, 4)
    file = ours.open(write(tmp_path, {TensorInfo("w", "BF16", (3, 4)): w.tobytes()}))
    np.testing.assert_array_equal(file.read("w").astype(np.float32), w.astype(np.float32))
