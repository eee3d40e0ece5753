"""A checkpoint is names, facts and, on demand, data. Files, sharded directories and whole models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from lorasurgery import plugins
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


# holds the finished edits of a directory that is being written
JOURNAL = ".lorasurgery-journal.jsonl"
# holds what edits leave for the plan's end, until all is complete
SCRATCH = ".lorasurgery-scratch"
# is written last: what was done, and how it went
MANIFEST = "surgery.json"


class Checkpoint(Protocol):
    """Random access to tensors that stay on disk. `info` reads no data; `read` reads one tensor."""

    @property
    def path(self) -> Path: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop of the first dimension, read-only; all of it by default."""
        ...

    def release(self, name: str) -> None:
        """The data of this tensor is not needed again soon: memory may go back to the system."""
        ...

    def place(self, name: str) -> tuple[Path, int] | None:
        """File and byte offset where exactly these bytes lie, or None if they are computed."""
        ...

    def storage(self, name: str) -> tuple[str, int]:
        """What the file calls this tensor's type (F32, Q4_1), and its bytes on disk."""
        ...


class Format(Protocol):
    """What a module in formats/ offers."""

    @property
    def SUFFIXES(self) -> tuple[str, ...]: ...
    def open(self, path: Path) -> Checkpoint: ...


class Union:
    """Several files as one checkpoint: the shards of a directory."""

    def __init__(self, path: Path, shards: Mapping[str, Checkpoint]) -> None:
        self.path, self.shards = path, dict(shards)
        self.metadata: Mapping[str, str] = {}
        self._owner: dict[str, Checkpoint] = {}
        for shard in self.shards.values():
            self.metadata = {**self.metadata, **shard.metadata}
            for name in shard:
                if name in self._owner:
                    raise FormatError(
                        f"{path}: {name} is in {self._owner[name].path.name} and in "
                        f"{shard.path.name}. Remove one of the two files."
                    )
                self._owner[name] = shard

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def __contains__(self, name: object) -> bool:
        return name in self._owner

    def owner(self, name: str) -> str:
        """The file that holds a tensor."""
        return self._owner[name].path.name

    def info(self, name: str) -> TensorInfo:
        return self._owner[name].info(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        return self._owner[name].read(name, start, stop)

    def release(self, name: str) -> None:
        self._owner[name].release(name)

    def place(self, name: str) -> tuple[Path, int] | None:
        return self._owner[name].place(name)

    def storage(self, name: str) -> tuple[str, int]:
        return self._owner[name].storage(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """A weight file, or a Hugging Face directory with one file or with an index of shards.

    Raises FormatError for a path that holds no weights, an index that points outside its
    directory, or a shard that is missing or broken.
    """
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory. Check the path.")
    if not path.is_file():
        raise FormatError(f"{path}: is no regular file. Check the path.")
    return open_file(path)


def open_file(path: Path) -> Checkpoint:
    """One weight file; its format is told by its suffix."""
    for name in plugins.names("formats"):
        module = cast(Format, plugins.load("formats", name))
        if path.name.endswith(module.SUFFIXES):
            return module.open(path)
    known = ", ".join(plugins.names("formats"))
    raise FormatError(f"{path}: no format reads {path.suffix or 'this'} files. Known: {known}.")


# in the order in which Hugging Face's loaders look
_SINGLE = (
    "model.safetensors",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "adapter_model.bin",
)
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".gguf", ".bin")


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory that hold its weights, in shard order; headers are not read."""
    if not (directory / "model.safetensors").exists() and (index := _index_of(directory)):
        return [_shard(index, name) for name in sorted(set(_weight_map(index).values()))]
    for name in _SINGLE:
        if (directory / name).exists():
            return [directory / name]
    for suffix in _SUFFIXES:
        found = sorted(directory.glob(f"*{suffix}"))
        if len(found) == 1:
            return found
        if found:
            raise FormatError(
                f"{directory}: {len(found)} {suffix} files and no index says how they belong "
                f"together. Name one of them, such as {found[0].name}."
            )
    raise FormatError(f"{directory}: no weights ({', '.join(_SUFFIXES)}) in it. Check the path.")


def _open_directory(directory: Path) -> Checkpoint:
    if _is_unfinished(directory):
        raise FormatError(
            f"{directory}: an interrupted run left it unfinished. Repeat that command with --resume."
        )
    files = weight_files(directory)
    index = None if (directory / "model.safetensors").exists() else _index_of(directory)
    if index is None:
        return open_file(files[0])
    union = Union(directory, {file.name: open_file(file) for file in files})
    _check_index(index, union)
    return union


def _is_unfinished(directory: Path) -> bool:
    journal = directory / JOURNAL
    # an empty one marks an old output that was about to be replaced: that one is whole
    begun = journal.is_file() and journal.stat().st_size > 0
    return begun and not (directory / MANIFEST).exists()


def _index_of(directory: Path) -> Path | None:
    """The index of shards: the one of the usual name, or else the only one."""
    for name in _INDICES:
        if (directory / name).exists():
            return directory / name
    found = sorted(directory.glob("*.index.json"))
    if len(found) > 1:
        raise FormatError(
            f"{directory}: {len(found)} indices of shards, {found[0].name} and {found[1].name}, and "
            "none of the usual name. Remove all but one."
        )
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    """What an index says: tensor name -> file name."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(map(_is_plain, names.values())):
        if isinstance(names, dict) and (odd := [v for v in names.values() if not _is_plain(v)]):
            raise FormatError(
                f"{index}: shard {odd[0]!r} is no plain file name. An index may only name files "
                "beside it."
            )
        raise FormatError(f"{index}: has no weight_map from tensors to files. Restore the file.")
    return names


def _is_plain(name: object) -> bool:
    """A name that can only mean a file beside the index."""
    plain = isinstance(name, str) and name.isprintable() and len(name.encode()) <= 255
    return plain and name == Path(str(name)).name and name not in ("", "..")


def _shard(index: Path, name: str) -> Path:
    shard = index.parent / name
    check_inside(index.parent, shard)
    if not shard.is_file():
        raise FormatError(f"{index}: shard {name} is missing. Download it again.")
    return shard


def check_inside(folder: Path, file: Path) -> None:
    """Raise FormatError for a file that is a link out of its folder."""
    home, target = folder.resolve(), _resolved(file)
    # the hub's cache keeps links to blobs beside its snapshots
    allowed = [home, *(p.parent / "blobs" for p in home.parents if p.name == "snapshots")]
    if not any(target.is_relative_to(place) for place in allowed):
        raise FormatError(
            f"{file}: is a link out of the directory, to {target}. Replace the link by the file."
        )


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        return path.parent.resolve() / path.name


def _check_index(index: Path, union: Union) -> None:
    """An index and its shards must name the same tensors in the same files."""
    said = _weight_map(index)
    for name, file in said.items():
        if name not in union.shards[file]:
            raise FormatError(
                f"{index}: {name} is said to be in {file}, but is not. Download both again."
            )
    for name in union:
        if name not in said:
            raise FormatError(
                f"{index}: {name} is in {union.owner(name)}, but the index does not name it. "
                "Download both again."
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the file.") from None
    except RecursionError:
        raise FormatError(f"{path}: nests too deep for JSON. Restore the file.") from None
    except ValueError as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}). Restore the file.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, not an object. Restore it.")
    return value
