"""Checkpoints: directories, indices and their tricks, shards, and packed weights seen as what they stand for."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.checkpoint import Checkpoint, open_checkpoint, open_file, weight_files
from lorasurgery.errors import FormatError
from lorasurgery.model import open_model, with_dtype
from lorasurgery.weights import Weights
from tests.forked import as_nobody

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def save(path: Path, *names: str, value: float = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file({n: np.full((2, 3), value, np.float32) for n in names}, path)
    return path


def index(folder: Path, weight_map: object, name: str = INDEX) -> Path:
    (folder / name).write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    )
    return folder / name


def sharded(folder: Path) -> Path:
    save(folder / ONE, "a", "b")
    save(folder / TWO, "c", value=2)
    index(folder, {"a": ONE, "b": ONE, "c": TWO})
    return folder


def refused(path: Path, opening: Callable[[Path], object] = open_checkpoint) -> str:
    with pytest.raises(FormatError) as error:
        opening(path)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- which files


def test_a_file_and_a_directory_of_one_file_are_the_same_checkpoint(tmp_path: Path) -> None:
    file = save(tmp_path / "model" / "model.safetensors", "w")
    for path in (file, file.parent):
        checkpoint = open_checkpoint(path)
        assert [str(checkpoint.info(name)) for name in checkpoint] == ["w  F32 [2, 3]"]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded(tmp_path))
    assert list(checkpoint) == ["a", "b", "c"]
    assert len(checkpoint) == 3
    assert "c" in checkpoint
    assert "d" not in checkpoint
    assert checkpoint.path == tmp_path
    np.testing.assert_array_equal(checkpoint.read("c"), np.full((2, 3), 2))
    assert checkpoint.place("c") == (tmp_path / TWO, (tmp_path / TWO).stat().st_size - 24)
    assert checkpoint.storage("c") == ("F32", 24)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.safetensors", INDEX, "pytorch_model.bin"], "model.safetensors"),
        (["pytorch_model.bin", "adapter_model.safetensors"], "adapter_model.safetensors"),
        (["odd.safetensors", "other.gguf"], "odd.safetensors"),
        (["model.gguf"], "model.gguf"),
        (["odd.bin"], "odd.bin"),
    ],
)
def test_the_file_is_taken_that_loaders_would_take(
    tmp_path: Path, there: list[str], taken: str
) -> None:
    for name in there:
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [tmp_path / taken]


@pytest.mark.parametrize("other", ["model.fp16.safetensors.index.json", "a.index.json"])
def test_an_index_of_the_usual_name_comes_before_a_variants(tmp_path: Path, other: str) -> None:
    index(sharded(tmp_path), {"x": "x.safetensors"}, other)
    assert list(open_checkpoint(tmp_path)) == ["a", "b", "c"]


def test_an_index_of_an_unusual_name_is_taken_where_it_is_alone(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    assert list(open_checkpoint(tmp_path)) == ["a", "b", "c"]


def test_two_indices_of_unusual_names_are_refused(tmp_path: Path) -> None:
    for name in ("x.index.json", "y.index.json"):
        index(tmp_path, {"a": "a.safetensors"}, name)
    assert refused(tmp_path) == (
        f"{tmp_path}: 2 indices of shards, x.index.json and y.index.json, and none of the usual "
        "name. Remove all but one."
    )


def test_several_files_and_no_index_are_refused(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        save(tmp_path / f"{name}.safetensors", name)
    assert refused(tmp_path) == (
        f"{tmp_path}: 3 .safetensors files and no index says how they belong together. "
        "Name one of them, such as a.safetensors."
    )


def test_a_path_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"{tmp_path}: no weights (.safetensors, .gguf, .bin) in it. Check the path."
    )
    gone = tmp_path / "gone"
    assert refused(gone) == f"{gone}: no such file or directory. Check the path."
    (tmp_path / "notes.txt").write_text("hello")
    assert refused(tmp_path / "notes.txt") == (
        f"{tmp_path / 'notes.txt'}: no format reads .txt files. "
        "Known: gguf, onnx, safetensors, torch_bin."
    )


# --- indices that trick


@pytest.mark.parametrize(
    "name",
    [
        "../other/model.safetensors",
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model.safetensors",
        "..",
        ".",
        "",
        "a\0b.safetensors",
        "a\nb.safetensors",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
        {"a": "b"},
    ],
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, name: object) -> None:
    save(tmp_path / "other" / "model.safetensors", "a")
    save(tmp_path / "model" / "sub" / "model.safetensors", "a")
    file = index(tmp_path / "model", {"a": name})
    assert refused(tmp_path / "model") == (
        f"{file}: shard {name!r} is no plain file name. An index may only name files beside it."
    )


def test_a_shard_that_is_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    target = save(tmp_path / "secret" / "x.safetensors", "a", "b")
    folder = sharded(tmp_path / "model")
    (folder / ONE).unlink()
    (folder / ONE).symlink_to(target)
    assert refused(folder) == (
        f"{folder / ONE}: is a link out of the directory, to {target}. Replace the link by the file."
    )


def test_a_shard_that_is_a_link_within_the_directory_is_read(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / ONE).rename(folder / "real")
    (folder / ONE).symlink_to("real")
    assert list(open_checkpoint(folder)) == ["a", "b", "c"]


@pytest.mark.parametrize("below", ["", "transformer"])
def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path: Path, below: str) -> None:
    """Each file there is a link to ../../blobs; so is the index itself."""
    blobs, snapshot = tmp_path / "m" / "blobs", tmp_path / "m" / "snapshots" / "0a1b" / below
    blobs.mkdir(parents=True)
    sharded(snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / f"{i}f00d")
        file.symlink_to(os.path.relpath(blobs / f"{i}f00d", snapshot))
    assert list(open_checkpoint(snapshot)) == ["a", "b", "c"]


def test_a_directory_reached_by_a_link_is_read(tmp_path: Path) -> None:
    sharded(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    assert list(open_checkpoint(tmp_path / "link")) == ["a", "b", "c"]


def test_links_in_a_circle_are_a_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / ONE).unlink()
    (folder / ONE).symlink_to(ONE)
    assert refused(folder) == f"{folder / INDEX}: shard {ONE} is missing. Download it again."


@pytest.mark.parametrize("kind", ["gone", "directory", "pipe"])
def test_a_missing_shard_is_named(tmp_path: Path, kind: str) -> None:
    folder = sharded(tmp_path)
    (folder / TWO).unlink()
    if kind == "directory":
        (folder / TWO).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / TWO)
    assert refused(folder) == f"{folder / INDEX}: shard {TWO} is missing. Download it again."


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A directory that every user may look into, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", [TWO, INDEX])
def test_a_file_that_may_not_be_read_is_named(shared_folder: Path, name: str) -> None:
    folder = sharded(shared_folder / "model")
    for file in folder.iterdir():
        file.chmod(0 if file.name == name else 0o644)
    assert as_nobody(lambda: open_checkpoint(folder)) == (
        f"{folder / name}: Permission denied. Check the file."
    )


def test_a_shard_that_is_cut_short_is_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    os.truncate(folder / TWO, (folder / TWO).stat().st_size - 5)
    assert refused(folder) == (
        f"{folder / TWO}: the tensors take 24 bytes, but the file holds 19: it is cut short. "
        "Restore the file."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "cannot be read as JSON (Expecting value: line 1 column 1 (char 0)). Restore the file.",
        ),
        (b"[1]", "holds a list, not an object. Restore it."),
        (b'{"weight_map": ' + b"[" * 100_000, "nests too deep for JSON. Restore the file."),
        (
            b"\xff",
            "cannot be read as JSON ('utf-8' codec can't decode byte 0xff in position 0: invalid "
            "start byte). Restore the file.",
        ),
        (b"{}", "has no weight_map from tensors to files. Restore the file."),
        (b'{"weight_map": {}}', "has no weight_map from tensors to files. Restore the file."),
        (b'{"weight_map": ["a"]}', "has no weight_map from tensors to files. Restore the file."),
        (b'{"weight_map": "a"}', "has no weight_map from tensors to files. Restore the file."),
        (b'{"weight_map": null}', "has no weight_map from tensors to files. Restore the file."),
    ],
)
def test_an_index_that_is_none_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / INDEX).write_bytes(content)
    assert refused(tmp_path) == f"{tmp_path / INDEX}: {message}"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)
files = st.sampled_from([ONE, TWO, "x.safetensors", INDEX, "."]) | values
maps = st.dictionaries(st.sampled_from("abcd"), files, max_size=4) | values


@settings(max_examples=200, deadline=None)
@given(maps)
def test_whatever_an_index_says_it_is_refused_in_one_line_or_true(
    tmp_path_factory: pytest.TempPathFactory, weight_map: object
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any-index"
    if not folder.exists():
        sharded(folder)
    index(folder, weight_map)
    try:
        checkpoint = open_checkpoint(folder)
    except FormatError as error:
        assert str(error).startswith(str(folder))
        assert "\n" not in str(error)
        return
    assert set(checkpoint) == set(weight_map)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    save(folder / TWO, "c", "a")
    assert refused(folder) == (
        f"{folder}: a is in {ONE} and in {TWO}. Remove one of the two files."
    )


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (
            {"a": ONE, "b": ONE, "c": TWO, "d": TWO},
            f"d is said to be in {TWO}, but is not. Download both again.",
        ),
        (
            {"a": ONE, "b": TWO, "c": TWO},
            f"b is said to be in {TWO}, but is not. Download both again.",
        ),
        (
            {"a": ONE, "c": TWO},
            f"b is in {ONE}, but the index does not name it. Download both again.",
        ),
    ],
)
def test_an_index_and_its_shards_must_name_the_same_tensors(
    tmp_path: Path, weight_map: Mapping[str, str], message: str
) -> None:
    folder = sharded(tmp_path)
    index(folder, weight_map)
    assert refused(folder) == f"{folder / INDEX}: {message}"


def test_an_index_of_one_shard_is_held_to_it_as_well(tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", "a")
    index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    assert refused(tmp_path) == (
        f"{tmp_path / INDEX}: b is said to be in x.safetensors, but is not. Download both again."
    )


def test_an_index_of_bin_files_is_held_to_them_as_well(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin")
    index(tmp_path, {"a": "x.bin", "b": "x.bin"}, "pytorch_model.bin.index.json")
    assert refused(tmp_path) == (
        f"{tmp_path}/pytorch_model.bin.index.json: b is said to be in x.bin, but is not. "
        "Download both again."
    )


# --- models


def test_a_models_side_files_are_all_that_are_no_weights_and_not_hidden(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "residual_adapter" / "model")  # a name above it means nothing
    kept = ("config.json", "tokenizer.model", "sub/vocab.txt", "modeling_x.py")
    dropped = (".gitattributes", ".git/config", "x.gguf", "pytorch_model.bin", "surgery.json",
               "optimizer.pt", "residual_adapter/adapter_config.json", "model.onnx")  # fmt: skip
    for name in (*kept, *dropped):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    model = open_model(folder)
    assert sorted(model.files) == sorted(kept)
    assert model.files["sub/vocab.txt"] == folder / "sub" / "vocab.txt"


def test_a_side_file_that_is_a_link_out_of_the_directory_is_not_carried_along(
    tmp_path: Path,
) -> None:
    folder = sharded(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    assert refused(folder, lambda path: open_model(path).files) == (
        f"{folder}/tokenizer.json: is a link out of the directory, to {tmp_path}/secret. "
        "Replace the link by the file."
    )


def test_a_config_that_is_no_object_is_one_line(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / "config.json").write_text('"llama"')
    message = f"{folder}/config.json: holds a str, not an object. Restore it."
    assert refused(folder, open_model) == message


def test_the_dtype_of_a_config_is_that_of_all_its_parts() -> None:
    config = {
        "dtype": "float32", "text_config": {"torch_dtype": "float32", "hidden_size": 8},
        "vision_config": {"depth": 2}, "quantization_config": {"dtype": "x"},
        "other": {"dtype": "float32"},
    }  # fmt: skip
    assert with_dtype(config, "F16") == {
        "dtype": "float16", "text_config": {"torch_dtype": "float16", "hidden_size": 8},
        "vision_config": {"depth": 2}, "quantization_config": {"dtype": "x"},
        "other": {"dtype": "float32"},
    }  # fmt: skip
    assert with_dtype(config, None) == config


# --- packed weights

# Dettmers et al. 2023, appendix E
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
SHAPE, BLOCK = (13, 20), 64  # 260 weights: four blocks and a rest; 20 divides neither


def packed(folder: Path, dtype: str = "bfloat16", **state: object) -> np.ndarray:
    """An NF4 directory as transformers stores it; returns the weight that it stands for."""
    rng = np.random.default_rng(0)
    n = SHAPE[0] * SHAPE[1]
    codes = rng.integers(0, 16, n, np.uint8)
    absmax = rng.random(-(-n // BLOCK), np.float32)
    facts = {"quant_type": "nf4", "blocksize": BLOCK, "dtype": dtype, "shape": SHAPE, **state}
    tensors = {
        "q.weight": (codes[::2] << 4 | codes[1::2])[:, None],
        "q.weight.absmax": absmax,
        "q.weight.quant_map": NF4,
        "q.weight.quant_state.bitsandbytes__nf4": np.frombuffer(
            json.dumps(facts).encode(), np.uint8
        ),
        "q.bias": np.arange(13, dtype=np.float32),
    }
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return (NF4[codes] * absmax[np.arange(n) // BLOCK]).reshape(SHAPE)


def test_packed_weights_look_like_what_they_stand_for(tmp_path: Path) -> None:
    want = packed(tmp_path).astype(ml_dtypes.bfloat16)
    weights = Weights(open_checkpoint(tmp_path))
    assert sorted(weights) == ["q.bias", "q.weight"]
    assert len(weights) == 2
    assert "q.weight" in weights
    assert "q.weight.absmax" not in weights
    assert str(weights.info("q.weight")) == "q.weight  BF16 [13, 20]"
    np.testing.assert_array_equal(weights.read("q.weight"), want)
    assert weights.place("q.weight") is None
    assert weights.storage("q.weight") == ("NF4", 130 + 20 + 64 + len(state_of(tmp_path)))
    np.testing.assert_array_equal(weights.read("q.bias"), np.arange(13))
    assert weights.storage("q.bias") == ("F32", 52)
    assert weights.place("q.bias") == open_checkpoint(tmp_path).place("q.bias")


def state_of(folder: Path) -> bytes:
    return bytes(open_checkpoint(folder).read("q.weight.quant_state.bitsandbytes__nf4"))


@pytest.mark.parametrize("rows", [(0, 1), (1, 2), (3, 9), (4, 13), (12, 13), (5, 5), (9, 99)])
def test_rows_of_a_packed_weight_are_those_of_the_whole(
    tmp_path: Path, rows: tuple[int, int]
) -> None:
    """Row 1 begins at weight 20, within a block; rows 12:13 end in the last, shorter one."""
    want = packed(tmp_path).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        Weights(open_checkpoint(tmp_path)).read("q.weight", *rows), want[slice(*rows)]
    )


@pytest.mark.parametrize(
    ("code", "kind"), [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16)]
)
def test_packed_weights_decode_to_the_dtype_that_is_asked(
    tmp_path: Path, code: str, kind: type
) -> None:
    want = packed(tmp_path).astype(kind)
    weights = Weights(open_checkpoint(tmp_path), code)
    assert weights.info("q.weight").dtype == code
    assert weights.read("q.weight").dtype == want.dtype
    np.testing.assert_array_equal(weights.read("q.weight"), want)


class Watched:
    """A checkpoint that notes what is released."""

    def __init__(self, stored: Checkpoint) -> None:
        self._stored, self.released = stored, []

    def __getattr__(self, name: str) -> object:
        return getattr(self._stored, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def release(self, name: str) -> None:
        self.released.append(name)
        self._stored.release(name)


def test_the_codes_of_a_large_packed_weight_are_given_back_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped pages count as memory until then; the window is 128 weights here."""
    monkeypatch.setattr("lorasurgery.weights._WINDOW", 128)
    want = packed(tmp_path).astype(ml_dtypes.bfloat16)
    stored = Watched(open_checkpoint(tmp_path))
    weights = Weights(stored)
    for row in range(13):
        np.testing.assert_array_equal(weights.read("q.weight", row, row + 1), want[row : row + 1])
    assert 2 <= stored.released.count("q.weight") <= 5


def test_a_released_weight_can_be_read_again(tmp_path: Path) -> None:
    packed(tmp_path)
    weights = Weights(open_checkpoint(tmp_path))
    first = weights.read("q.weight").tobytes()
    weights.release("q.weight")
    weights.release("q.bias")
    assert weights.read("q.weight").tobytes() == first


STATE = "q.weight.quant_state.bitsandbytes__nf4: not a quantization state"
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"shape": [13, 21]}, "q.weight: 130 entries, but [13, 21] in blocks of 64 takes 137"),
        ({"blocksize": 128}, "q.weight.absmax: 5 entries, but [13, 20] in blocks of 128 takes 3"),
        (NESTED, "q.weight is nf4 [13, 20], but q.weight.nested_absmax is missing"),
        ({"shape": []}, f"{STATE} (shape [])"),
        ({"shape": [-13, -20]}, f"{STATE} (shape [-13, -20])"),
        ({"shape": [13.0, 20]}, f"{STATE} (shape [13.0, 20])"),
        ({"shape": [True, 260]}, f"{STATE} (shape [True, 260])"),
        ({"shape": ["13", 20]}, f"{STATE} (shape ['13', 20])"),
        ({"shape": 260}, f"{STATE} (shape 260)"),
        ({"blocksize": 0}, f"{STATE} (blocksize 0)"),
        ({"blocksize": -64}, f"{STATE} (blocksize -64)"),
        ({"blocksize": 63}, f"{STATE} (blocksize 63)"),
        ({"dtype": "int3"}, f"{STATE} (dtype 'int3')"),
        ({"dtype": ["x"]}, f"{STATE} (dtype ['x'])"),
        ({**NESTED, "nested_offset": "0"}, f"{STATE} (nested_offset 0)"),
        ({**NESTED, "nested_offset": float("nan")}, f"{STATE} (nested_offset nan)"),
        ({**NESTED, "nested_blocksize": 0}, f"{STATE} (nested_blocksize 0)"),
        ({**NESTED, "nested_dtype": "int8"}, f"{STATE} (nested_dtype 'int8')"),
    ],
)
def test_a_packed_weight_whose_state_lies_is_one_line(
    tmp_path: Path, state: dict[str, object], message: str
) -> None:
    packed(tmp_path, **state)
    assert refused(tmp_path, lambda path: Weights(open_checkpoint(path))) == (
        f"{tmp_path}/model.safetensors: {message}. Restore the file."
    )


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [
        (".absmax", np.zeros(4, np.float32), "4 entries, but [13, 20] in blocks of 64 takes 5"),
        (".absmax", np.zeros(5, np.uint8), "U8, but F32 or BF16 or F16 is due"),
        (
            ".quant_map",
            np.zeros(15, np.float32),
            "15 entries, but [13, 20] in blocks of 64 takes 16",
        ),
        ("", np.zeros(129, np.uint8), "129 entries, but [13, 20] in blocks of 64 takes 130"),
    ],
)
def test_a_part_of_a_packed_weight_that_does_not_fit_is_one_line(
    tmp_path: Path, part: str, content: np.ndarray, message: str
) -> None:
    packed(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({**tensors, f"q.weight{part}": content}, file)
    assert refused(tmp_path, lambda path: Weights(open_checkpoint(path))) == (
        f"{file}: q.weight{part}: {message}. Restore the file."
    )


def test_an_unknown_suffix_of_a_known_kind_is_found_by_its_name_alone(tmp_path: Path) -> None:
    (tmp_path / "weights.msgpack").write_text("x")
    with pytest.raises(FormatError, match=r"no format reads \.msgpack files\. Known: "):
        open_file(tmp_path / "weights.msgpack")


def as_protocol(checkpoint: Checkpoint) -> Checkpoint:
    return checkpoint


def test_all_views_of_a_checkpoint_keep_its_contract(tmp_path: Path) -> None:
    sharded(tmp_path)
    for view in (open_checkpoint(tmp_path), Weights(open_checkpoint(tmp_path))):
        kept = as_protocol(view)
        for name in kept:
            info = kept.info(name)
            assert kept.read(name).shape == info.shape
            assert kept.read(name, 1, 2).shape == (1, *info.shape[1:])
            assert not kept.read(name).flags.writeable
            kept.release(name)
