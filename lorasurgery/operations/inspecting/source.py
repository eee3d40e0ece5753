"""What `inspect` looks at: a checkpoint's headers, and the JSON files beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lorasurgery import plugins
from lorasurgery.checkpoint import Checkpoint, Format, open_checkpoint, read_json, weight_files

DOCUMENTS = ("config.json", "adapter_config.json", "surgery.json")


@dataclass(frozen=True, slots=True)
class Source:
    """`documents` are those of DOCUMENTS that are there; `files` hold the weights."""

    label: str
    stored: Checkpoint
    files: tuple[str, ...]
    documents: Mapping[str, Mapping[str, Any]]

    @property
    def format(self) -> str:
        return format_of(self.files[0])


def open_source(path: Path) -> Source:
    """A directory or a file on this machine; headers alone are read."""
    stored = open_checkpoint(path)
    files, home, beside = [path], path.parent, list(DOCUMENTS)
    if path.is_dir():
        files, home = weight_files(path), path
    elif path.name.startswith("adapter_model"):
        beside = ["adapter_config.json"]
    else:
        beside = []  # one shard, or a file that says all by itself
    documents = {n: read_json(home / n) for n in beside if (home / n).exists()}
    return Source(str(path), stored, tuple(f.name for f in files), documents)


def format_of(file: str) -> str:
    """The format plug-in whose suffix this file has."""
    return next(
        name
        for name in plugins.names("formats")
        if file.endswith(cast(Format, plugins.load("formats", name)).SUFFIXES)
    )
