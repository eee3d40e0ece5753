"""The undo file: a safetensors file of compressed records, one for each stored tensor of the base.

Its metadata holds the base's exact layout (the headers of its files), its config and index, which adapters
were merged, and which records are differences to a prediction (`_undo_record`). A record is a zstd frame
and the blake3 digest of the base's bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blake3

from lorasurgery import __version__
from lorasurgery.adapter import Adapter
from lorasurgery.arrays import as_bytes
from lorasurgery.checkpoint import SCRATCH, weight_files
from lorasurgery.errors import FormatError, OutputError
from lorasurgery.formats import safetensors
from lorasurgery.model import Model
from lorasurgery.operations.undoing.undo_record import FOLDER, file_name
from lorasurgery.output import INDEX
from lorasurgery.place import writing
from lorasurgery.tensors import TensorInfo

FORMAT = "lorasurgery-undo-1"


@dataclass(frozen=True, slots=True)
class Undo:
    """What to keep for the way back, and where."""

    path: Path
    differences: tuple[str, ...]  # stored tensors of the base that are predicted
    wholes: tuple[str, ...]  # stored tensors of the base that are kept
    facts: Mapping[str, Any]  # the base's layout, config and index; the adapters

    def assemble(self, partial: Path) -> None:
        """All recorded tensors into one file, which has its name when the output is complete."""
        folder = partial / SCRATCH / FOLDER
        names = [*self.differences, *self.wholes]
        files = [folder / file_name(name) for name in names]
        infos = [
            TensorInfo(n, "U8", (f.stat().st_size,)) for n, f in zip(names, files, strict=True)
        ]
        facts = {**self.facts, "lorasurgery": __version__, "wholes": list(self.wholes)}
        header = safetensors.header_of(infos, {"format": FORMAT, "facts": json.dumps(facts)})
        with writing(self._part, "the undo file"), self._part.open("wb") as out:
            out.write(len(header).to_bytes(8, "little") + header)
            for file in files:
                with file.open("rb") as source:
                    shutil.copyfileobj(source, out)

    def publish(self) -> None:
        """The output is complete: the assembled file gets its name, if it has not yet."""
        with writing(self.path, "the undo file"), suppress(FileNotFoundError):
            os.replace(self._part, self.path)

    def discard(self) -> None:
        """There will be no output: an undo file of an older one stays what it is."""
        self._part.unlink(missing_ok=True)

    @property
    def _part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")


def check_target(path: Path, output: Path, *, overwrite: bool) -> None:
    """Raises OutputError unless an undo file may be written there."""
    if output.resolve() in path.resolve().parents:
        raise OutputError(f"{path}: lies inside the output. Name a file beside it.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path}: exists. Pass --overwrite, or name another file.")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path}: its directory does not exist. Make it first.")


def layout_facts(model: Model) -> dict[str, Any]:
    """The base's files as they lie: headers, index, config. Raises FormatError for other formats."""
    files = weight_files(model.path) if model.path.is_dir() else [model.path]
    for file in files:
        if file.suffix != ".safetensors":
            raise FormatError(
                f"{file}: an undo file brings back safetensors alone. Run `lorasurgery "
                "convert-checkpoint` first."
            )
    texts = {name: model.path / name for name in (INDEX, "config.json") if model.path.is_dir()}
    return {
        "base": str(model.path),
        "shards": [{"file": f.name, "header": _header(f)} for f in files],
        "files": {name: path.read_text() for name, path in texts.items() if path.is_file()},
    }


def _header(file: Path) -> str:
    return safetensors.open(file).header.decode()


def adapter_facts(adapters: Sequence[tuple[Adapter, float]]) -> list[dict[str, Any]]:
    """Which adapters were merged, so that no other is subtracted: path, weight, digest of the factors."""
    return [
        {"path": str(adapter.path), "weight": weight, "digest": _adapter_digest(adapter)}
        for adapter, weight in adapters
    ]


def _adapter_digest(adapter: Adapter) -> str:
    digest = blake3.blake3()
    for site in adapter.sites:
        digest.update(f"{site.module}.{site.parameter} {site.config.scaling!r}".encode())
        for name, factor in sorted(site.load().items()):
            digest.update(name.encode())
            digest.update(as_bytes(factor))
    return f"blake3:{digest.hexdigest()}"
