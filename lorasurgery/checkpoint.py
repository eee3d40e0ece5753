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
_SUFFIXES = (".safetensors", ".gguf", ".bin")


def weight_files(directory: Path) -> list[Path]:
    """The files of a directory that hold its weights, in shard order; headers are not read."""
    indices = sorted(directory.glob("*.safetensors.index.json"))
    indices = indices or sorted(directory.glob("*.bin.index.json"))
    if indices and not (directory / "model.safetensors").exists():
        return _indexed(indices[0])
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
    files = weight_files(directory)
    if len(files) == 1:
        return open_file(files[0])
    return Union(directory, {file.name: open_file(file) for file in files})


def _indexed(index: Path) -> list[Path]:
    """The shards that an index names, each inside the index's own directory."""
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{index}: not an index of shards ({error}). Restore the file.") from None
    return [_shard(index, name) for name in names]


def _shard(index: Path, name: Any) -> Path:
    if not isinstance(name, str) or not name or name != Path(name).name or name in (".", ".."):
        raise FormatError(
            f"{index}: shard {name!r} is no plain file name. An index may only name files beside it."
        )
    home = index.parent.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the hub's cache keeps links to ../../blobs
        allowed.append(home.parent.parent / "blobs")
    target = (index.parent / name).resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise FormatError(
            f"{index}: shard {name} is a link out of the directory, to {target}. "
            "Replace the link by the file."
        )
    if not target.is_file():
        raise FormatError(f"{index}: shard {name} is missing. Download it again.")
    return index.parent / name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an error that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: cannot be read as JSON ({error}). Restore the file.") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, not an object. Restore it.")
    return value
