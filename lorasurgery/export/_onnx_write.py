"""An edited ONNX model to disk: OUT.onnx, and OUT.onnx.data beside it where that is wanted; atomically.

OUT.onnx.data is taken under a name that is free, so that the old model keeps its data until the new one
takes its place, in one step.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lorasurgery.arrays import as_bytes
from lorasurgery.errors import FormatError, OutputError
from lorasurgery.export._onnx_edit import Edited
from lorasurgery.formats.onnx import File
from lorasurgery.place import check_room, partial_of, writing

if TYPE_CHECKING:
    import onnx

    from lorasurgery.arrays import Array

# more than this goes into a file of its own; a protocol buffer ends at 2 GiB, and is held in memory
INLINE = 256 << 20
_SMALL = 1 << 10  # shapes and scalars stay in the graph: runtimes look at them while they load
_PAGE = 1 << 12  # onnxruntime maps data that begins with a page
_CHUNK = 16 << 20


def check_file(path: Path, source: Path, *, overwrite: bool) -> None:
    """Raise OutputError unless `path` can become a file that is not the source."""
    if path.suffix != ".onnx":
        raise OutputError(f"{path}: an ONNX model is written to a file. Name it {path.name}.onnx.")
    if path.is_dir():
        raise OutputError(f"{path}: is a directory. Name another output.")
    if path.exists() and path.resolve() == source.resolve():
        raise OutputError(f"{path}: is the input {source}. Name another output.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path}: exists. Pass --overwrite, or name another.")


def write(
    edited: Edited, path: Path, done: Callable[[str, int], None], check: Callable[[], None]
) -> int:
    """Write the model and everything it is made of; returns its bytes.

    `done` hears of each tensor; `check` raises, when all are known, if the old model is to stay.
    """
    proto = edited.proto()
    sizes = {t.name: _nbytes(edited, t) for t in proto.graph.initializer if _comes(edited, t)}
    outside = sum(sizes.values()) > INLINE or bool(edited.file.data_files)
    check_room(path, sum(sizes.values()))
    old = _data_files(path) - edited.file.data_files
    data = _free(path) if outside else None
    with partial_folder(path) as folder, writing(path, "the model"):
        if data:
            with (folder / data.name).open("wb") as file:
                _stream(edited, proto, file, sizes, done)
        for tensor in proto.graph.initializer:
            if tensor.name in sizes and not tensor.external_data:
                tensor.raw_data = _content(edited, tensor.name).tobytes()
                done(tensor.name, sizes[tensor.name])
        (folder / path.name).write_bytes(proto.SerializeToString())
        total = sum(written.stat().st_size for written in folder.iterdir())
        check()
        if data:
            os.replace(folder / data.name, data)
        os.replace(folder / path.name, path)
    for stale in old:
        with suppress(FileNotFoundError):
            stale.unlink()
    return total


def _comes(edited: Edited, tensor: onnx.TensorProto) -> bool:
    """Whether its data is still to be written; clears what stands for it."""
    import onnx

    stored = edited.file.header.initializers.get(tensor.name)
    if tensor.name not in edited.made and (stored is None or stored.file is None):
        return False
    facts = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    tensor.CopyFrom(facts)
    return True


def _stream(
    edited: Edited,
    proto: onnx.ModelProto,
    file: BinaryIO,
    sizes: dict[str, int],
    done: Callable[[str, int], None],
) -> None:
    """One tensor after another into the data file, and where it lies into the graph."""
    name = Path(file.name).name
    for tensor in proto.graph.initializer:
        nbytes = sizes.get(tensor.name, 0)
        if nbytes < _SMALL:
            continue
        file.seek(-(-file.tell() // _PAGE) * _PAGE if nbytes >= _PAGE else file.tell())
        offset = file.tell()
        if tensor.name in edited.made:
            file.write(memoryview(as_bytes(edited.made[tensor.name]())))
        else:
            copy_bytes(edited.file, tensor.name, file)
        for key, value in (("location", name), ("offset", offset), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        tensor.data_location = 1
        assert file.tell() == offset + nbytes, tensor.name
        done(tensor.name, nbytes)
    file.truncate()


def copy_bytes(source: File, name: str, file: BinaryIO) -> None:
    """The bytes as they lie, with no tensor in memory; holes of a sparse file stay holes."""
    place, nbytes = source.place(name), source.storage(name)[1]
    assert place is not None, name
    at, shift = place[1], file.tell() - place[1]
    end = at + nbytes
    with place[0].open("rb") as data:
        while (at := _next_data(data, at, end)) < end:
            data.seek(at)
            chunk = data.read(min(_CHUNK, end - at))
            if not chunk:
                raise FormatError(f"{place[0]}: {name} ends too early. Copy the file anew.")
            file.seek(at + shift)
            file.write(chunk)
            at += len(chunk)
    file.seek(end + shift)


def _next_data(file: BinaryIO, at: int, end: int) -> int:
    """Where the file holds something again, or the end."""
    if at >= end or not hasattr(os, "SEEK_DATA"):
        return at
    try:
        return min(end, os.lseek(file.fileno(), at, os.SEEK_DATA))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        raise


def _content(edited: Edited, name: str) -> Array:
    if name in edited.made:
        return as_bytes(edited.made[name]())
    return as_bytes(edited.file.read(name))


def _nbytes(edited: Edited, tensor: onnx.TensorProto) -> int:
    if tensor.name not in edited.made:
        return edited.file.storage(tensor.name)[1]
    value: Any = edited.graph.initializers[tensor.name].const_value
    return int(value.nbytes)


def _free(path: Path) -> Path:
    names = (path.name + ".data" + (f".{i}" if i else "") for i in count())
    return next(p for p in map(path.with_name, names) if not p.exists())


def _data_files(path: Path) -> set[Path]:
    """What the model that is there has its data in, where those files are named after it."""
    if not path.exists():
        return set()
    try:
        files = File(path).data_files
    except FormatError:
        return set()
    return {file for file in files if file.name.startswith(path.name + ".data")}


@contextmanager
def partial_folder(path: Path) -> Iterator[Path]:
    """A directory beside the output that is gone afterwards, whatever happens."""
    folder = partial_of(path)
    with writing(path, "the model"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
