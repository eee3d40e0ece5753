"""The files of an ONNX model, put together again from a merged one and the undo file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import numpy as np

from lorasurgery.arrays import Array, as_bytes
from lorasurgery.change import Change, LowRank
from lorasurgery.errors import FormatError, VerificationError
from lorasurgery.export._onnx_merge import walk
from lorasurgery.export._onnx_modules import Modules
from lorasurgery.export._onnx_write import copy_bytes
from lorasurgery.operations.undoing.onnx_layout import CHUNK, between, record_of
from lorasurgery.operations.undoing.undo_read import UndoFile
from lorasurgery.operations.undoing.undo_record import restore


@dataclass(frozen=True, slots=True)
class Rebuild:
    """`changes`: what was added to a tensor of the view; `done` hears of each weight and its bytes."""

    merged: Modules
    undo: UndoFile
    changes: Mapping[str, Callable[[], Change]]
    done: Callable[[str, int], None]

    def write(self, entry: Mapping[str, Any], path: Path) -> None:
        """One file of the base. Raises VerificationError for bytes that do not come back."""
        weights: Sequence[tuple[str, int, int]] = entry["weights"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for name, offset, nbytes in weights:
                out.seek(offset)
                self._weight(name, nbytes, out)
                self.done(name, nbytes)
            self._rest(entry, out)
            out.truncate(entry["size"])

    def _rest(self, entry: Mapping[str, Any], out: BinaryIO) -> None:
        """What lay between the weights."""
        record, digest = record_of(entry["file"]), blake3.blake3()
        with self.undo.differences(record, np.dtype(np.uint8)) as take:
            for start, stop in between(entry["weights"], entry["size"]):
                out.seek(start)
                for at in range(start, stop, CHUNK):
                    chunk = take(min(CHUNK, stop - at)).tobytes()
                    digest.update(chunk)
                    out.write(chunk)
        self._check(record, digest)

    def _weight(self, name: str, nbytes: int, out: BinaryIO) -> None:
        file = self.merged.file
        if name in self.undo.wholes:
            whole = self.undo.whole(name)
            self._check(name, blake3.blake3(whole))
            out.write(whole.data)
        elif name in self.undo.facts["changed"]:
            out.write(as_bytes(self._before(name)).data)
        elif name not in file or file.storage(name)[1] != nbytes:
            raise _foreign(self.merged, self.undo, name)
        elif file.place(name):
            copy_bytes(file, name, out)
        else:
            out.write(as_bytes(file.read(name)).data)

    def _before(self, name: str) -> Array:
        """An initializer as it was, from what it has become."""
        shown, digest = self.undo.facts["changed"][name], blake3.blake3()
        place = self.merged.places.get(shown)
        if place is None or place.initializer != name:
            raise _foreign(self.merged, self.undo, name)
        stored = self.merged.file.read(name)
        before = np.empty_like(stored)
        now, was = (stored.T, before.T) if place.turned else (stored, before)
        change = self.changes.get(shown, lambda: LowRank.nothing(self.merged.info(shown)))()
        with self.undo.differences(name, np.dtype(f"u{stored.dtype.itemsize}")) as take:
            for at, rows, piece, _ in walk(now, change):
                tile = restore(piece.before(rows, rows.dtype), take(rows.size))
                digest.update(as_bytes(tile))
                was[at] = tile.reshape(was[at].shape)
        self._check(name, digest)
        self.merged.file.release(name)
        return before

    def _check(self, name: str, digest: blake3.blake3) -> None:
        if f"blake3:{digest.hexdigest()}" != self.undo.digest(name):
            raise VerificationError(
                f"{self.merged.path}: {name} does not come back: its bytes differ from the base's. "
                "The merged weights were changed since, or another adapter was named."
            )


def _foreign(merged: Modules, undo: UndoFile, name: str) -> FormatError:
    return FormatError(
        f"{merged.path}: {name} is to be taken from it, but it has none like the base's. {undo.path} "
        "was written for another merge."
    )
