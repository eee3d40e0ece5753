"""Adapters that are one file: which file of a path it is, and a safetensors file written tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.checkpoint import Checkpoint, open_file
from lorasurgery.dialects._peft_lora_write import Stored
from lorasurgery.errors import FormatError
from lorasurgery.formats import safetensors

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# what makes a directory a pipeline, or an adapter of PEFT's or ours
_CONFIGS = ("adapter_config.json", "adapter.json", "model_index.json")


def find(path: Path, suffix: str) -> Path | None:
    """The file itself, or the only one of this suffix in a directory that no config speaks for."""
    if path.is_file():
        return path if path.name.endswith(suffix) else None
    if not path.is_dir() or any((path / name).exists() for name in _CONFIGS):
        return None
    found = sorted(path.glob(f"*{suffix}"))
    return found[0] if len(found) == 1 else None


def opened(path: Path, suffix: str) -> Checkpoint:
    """The checkpoint in it. Raises FormatError where `find` finds none."""
    file = find(path, suffix)
    if file is None:
        raise FormatError(f"{path}: is no {suffix} file, and holds not exactly one. Name the file.")
    return open_file(file)


def write(file: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> None:
    """A safetensors file, one tensor in memory at a time."""
    header = safetensors.header_of([info for info, _ in tensors.values()], metadata)
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little") + header)
        for info, load in tensors.values():
            data = load()
            assert data.nbytes == info.nbytes, info
            out.write(data.tobytes())


def nothing(name: str) -> Array:
    """What loads whole tensors of an adapter that has none."""
    raise KeyError(name)
