"""Where an output may go: beside its inputs, onto nothing or onto what may be replaced, with room for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lorasurgery import place
from lorasurgery.errors import OutputError
from tests.forked import as_nobody
from tests.outputs import begun, written


def check(path: Path, inputs: tuple[Path, ...], *, overwrite: bool) -> None:
    place.check_apart(path, inputs)
    place.check_free(path, overwrite=overwrite)
    place.check_room(path, 0)


def refused(path: Path, *inputs: Path, overwrite: bool = False) -> str:
    with pytest.raises(OutputError) as error:
        check(path, inputs, overwrite=overwrite)
    return str(error.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


# --- where it may go


@pytest.mark.parametrize("flags", [False, True], ids=["plain", "overwrite"])
def test_an_output_that_is_or_holds_an_input_is_refused(model: Path, flags: bool) -> None:
    file, home = model / "model.safetensors", model.parent
    for out, source in ((model, model), (home, model), (file, file), (model, file), (home, file)):
        assert refused(out, source, overwrite=flags) == (
            f"{out}: is or holds the input {source}. Name another output."
        )


def test_an_output_that_reaches_the_input_by_a_link_is_refused(model: Path) -> None:
    link = model.parent / "link"
    link.symlink_to(model)
    assert refused(link, model) == f"{link}: is or holds the input {model}. Name another output."
    assert refused(model, link) == f"{model}: is or holds the input {link}. Name another output."
    out = link / "out"
    assert refused(out, model) == f"{out}: lies inside the input {model}. Name another output."


def test_an_output_inside_the_input_is_refused(model: Path) -> None:
    for out in (model / "out", model / "deep" / "er" / "out"):
        assert refused(out, model) == f"{out}: lies inside the input {model}. Name another output."


def test_an_output_beside_a_lone_file_is_allowed(model: Path) -> None:
    place.check_apart(model / "out", [model / "model.safetensors"])


@pytest.mark.parametrize("ending", [".partial", ".replaced"])
def test_an_output_whose_scratch_directory_would_be_the_input_is_refused(
    tmp_path: Path, ending: str
) -> None:
    source = tmp_path / f"out{ending}"
    source.mkdir()
    assert refused(tmp_path / "out", source, overwrite=True) == (
        f"{source}: is or holds the input {source}. Name another output."
    )


@pytest.mark.parametrize("name", [".", "/", ".."])
def test_an_output_without_a_name_of_its_own_is_refused(name: str) -> None:
    assert refused(Path(name)) == (
        f"{name}: names no directory of its own. Give the output a name."
    )


def test_an_output_that_is_a_file_or_a_link_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link", "broken"):
        assert refused(tmp_path / name, overwrite=True) == (
            f"{tmp_path / name}: is there and is no directory. Name another output."
        )


def test_an_output_that_is_not_empty_is_refused_and_an_empty_one_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    written(out)
    assert refused(out) == f"{out}: exists and is not empty. Pass --overwrite, or name another."
    place.check_free(out, overwrite=True)


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "sub" / "out"
    assert (
        refused(out) == f"{out}: {tmp_path / 'file'} is a file, no directory. Name another output."
    )


def test_more_than_the_disk_has_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(OutputError) as error:
        place.check_room(out, 1 << 60)
    free = str(error.value).partition(f"{tmp_path} has ")[2].partition(" MiB")[0]
    assert str(error.value) == (
        f"{out}: needs {(1 << 40) + 16} MiB, but {tmp_path} has {free} MiB free. "
        "Make room, or name another output."
    )
    stat = os.statvfs(tmp_path)
    # other processes write to the disk meanwhile
    assert int(free) == pytest.approx(stat.f_bavail * stat.f_frsize >> 20, rel=0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """A directory that every user may look into, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_place_that_may_not_be_written_to_is_refused(shared_folder: Path) -> None:
    closed = shared_folder / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    out = closed / "sub" / "out"
    assert as_nobody(lambda: place.check_room(out, 0)) == (
        f"{out}: {closed} cannot be written to. Name another output."
    )
    partial = closed / "out.partial"
    assert as_nobody(lambda: begun(closed / "out")) == (
        f"{partial}: the output cannot be written (Permission denied). "
        "Check the disk, or name another output."
    )
    assert list(closed.iterdir()) == []


def test_a_place_where_even_root_may_not_write_is_one_line() -> None:
    out = Path("/proc/lorasurgery-test/out")
    with pytest.raises(OSError) as system:  # noqa: PT011 - what the system says of it
        out.parent.mkdir()
    with pytest.raises(OutputError) as error:
        begun(out)
    assert str(error.value) == (
        f"{out}.partial: the output cannot be written ({system.value.strerror}). "
        "Check the disk, or name another output."
    )
