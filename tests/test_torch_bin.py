"""torch.save's files: every layout of tensors read as saved, and no code of theirs run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasurgery.arrays import to_torch
from lorasurgery.checkpoint import open_checkpoint, open_file
from lorasurgery.errors import FormatError


def saved(tmp_path: Path, content: object, name: str = "pytorch_model.bin") -> Path:
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_a_tensor_of_each_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    w = (torch.arange(15).reshape(5, 3) % 7).to(dtype)
    file = open_file(saved(tmp_path, {"w": w}))
    assert file.info("w").shape == (5, 3)
    assert torch.equal(to_torch(file.read("w").copy()), w)
    assert torch.equal(to_torch(file.read("w", 1, 4).copy()), w[1:4])
    assert file.storage("w") == (file.info("w").dtype, w.nbytes)


def test_float8_keeps_its_bytes(tmp_path: Path) -> None:
    w = torch.linspace(-4, 4, 12).reshape(3, 4).to(torch.float8_e4m3fn)
    file = open_file(saved(tmp_path, {"w": w}))
    assert str(file.info("w")) == "w  F8_E4M3 [3, 4]"
    assert file.read("w").tobytes() == w.view(torch.uint8).numpy().tobytes()


def test_transposed_sliced_and_shared_tensors_are_read_as_they_look(tmp_path: Path) -> None:
    w = torch.arange(24.0).reshape(6, 4)
    tied = {"w": w, "tied": w, "t": w.T, "part": w[2:5], "scalar": torch.tensor(2.5)}
    file = open_file(saved(tmp_path, tied))
    assert len(file) == 5
    np.testing.assert_array_equal(file.read("tied"), w.numpy())
    np.testing.assert_array_equal(file.read("t"), w.T.numpy())
    np.testing.assert_array_equal(file.read("t", 1, 3), w.T[1:3].numpy())
    np.testing.assert_array_equal(file.read("part"), w[2:5].numpy())
    assert file.read("scalar") == np.float32(2.5)


def test_what_is_read_cannot_be_written(tmp_path: Path) -> None:
    file = open_file(saved(tmp_path, {"w": torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match="read-only"):
        file.read("w")[0, 0] = 1


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_trainers_checkpoint_gives_its_state_dict(tmp_path: Path, key: str) -> None:
    content = {key: {"w": torch.ones(2, 3)}, "optimizer": {"lr": 0.1}, "epoch": 3}
    file = open_file(saved(tmp_path, content, "last.pt"))
    assert [str(file.info(name)) for name in file] == ["w  F32 [2, 3]"]


def test_plain_values_beside_the_tensors_are_metadata(tmp_path: Path) -> None:
    file = open_file(saved(tmp_path, {"w": torch.ones(2), "version": 2, "name": "x"}))
    assert list(file) == ["w"]
    assert file.metadata == {"version": "2", "name": "x"}


def test_a_file_from_before_the_zip_format_is_read(tmp_path: Path) -> None:
    w = torch.randn(4, 3)
    torch.save({"w": w}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_file(tmp_path / "old.bin").read("w"), w.numpy())


def test_the_shards_of_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, {"a": torch.ones(2)}, "pytorch_model-00001-of-00002.bin")
    saved(tmp_path, {"b": torch.zeros(3)}, "pytorch_model-00002-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(
        '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin",'
        ' "b": "pytorch_model-00002-of-00002.bin"}}'
    )
    assert sorted(open_checkpoint(tmp_path)) == ["a", "b"]


class Attack:
    """Unpickled without care, it makes a directory."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(
    tmp_path: Path, zipped: bool
) -> None:
    path, target = tmp_path / "bad.bin", tmp_path / "made"
    torch.save({"w": Attack(target)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FormatError) as error:
        open_file(path)
    assert str(error.value) == (
        f"{path}: its pickle asks for posix.mkdir, which no weight needs; nothing of it was run. "
        "Use a safetensors file of this model."
    )
    assert not target.exists()


def test_a_pickle_that_loops_back_on_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, object] = {}
    loop["state_dict"] = loop
    with pytest.raises(FormatError, match="state_dict is a dict, not a tensor"):
        open_file(saved(tmp_path, loop))


@pytest.mark.parametrize("kind", ["junk", "empty", "cut", "plain pickle"])
def test_a_file_that_torch_did_not_write_is_one_line(tmp_path: Path, kind: str) -> None:
    whole = saved(tmp_path, {"w": torch.ones(100)}, "whole.pt").read_bytes()
    path = tmp_path / "bad.bin"
    path.write_bytes(
        {"junk": b"hello world, this is junk", "empty": b"", "cut": whole[: len(whole) // 2],
         "plain pickle": pickle.dumps({"a": [1]})}[kind]
    )  # fmt: skip
    with pytest.raises(FormatError) as error:
        open_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(2), "holds a Tensor, not a dict of tensors"),
        ({"w": torch.ones(2), "opt": {"lr": 1}}, r"opt is a dict, not a tensor \(1 such in all\)"),
        ({"w": torch.eye(3).to_sparse()}, "w is a torch.sparse_coo float32 tensor on cpu"),
        ({"w": torch.ones(2, device="meta")}, "w is a torch.strided float32 tensor on meta"),
        ({"w": torch.ones(2, dtype=torch.complex128)}, "complex128"),
    ],
)
def test_what_is_no_dense_tensor_is_refused_by_name(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        open_file(saved(tmp_path, content))
