"""Reading an undo file: what it says of the base, and the records of the base's tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zstandard

from lorasurgery.arrays import Array
from lorasurgery.errors import FormatError
from lorasurgery.formats import safetensors
from lorasurgery.operations.undoing.undo_file import FORMAT
from lorasurgery.operations.undoing.undo_record import CHUNK, DIGEST_BYTES

Take: TypeAlias = Callable[[int], Array]


class UndoFile:
    """An opened undo file: facts, and the recorded bytes of each stored tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = safetensors.open(path)
        if self._file.metadata.get("format") != FORMAT:
            raise FormatError(
                f"{path}: is no undo file of this version. `merge --undo FILE` writes one."
            )
        self.facts: dict[str, Any] = json.loads(self._file.metadata["facts"])
        self.wholes = frozenset(self.facts["wholes"])

    def __contains__(self, name: object) -> bool:
        return name in self._file

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def digest(self, name: str) -> str:
        """Of the base's bytes, in the form that surgery.json has."""
        return f"blake3:{bytes(self._file.read(name)[-DIGEST_BYTES:]).hex()}"

    def whole(self, name: str) -> Array:
        """The bytes of a tensor that was kept as it was: uint8."""
        with self._reader(name) as reader:
            return np.frombuffer(reader.readall(), np.uint8)

    @contextmanager
    def differences(self, name: str, kind: np.dtype[Any]) -> Iterator[Take]:
        """A function that gives the next n elements, unsigned integers as wide as `kind`."""
        with self._reader(name) as reader:
            held = np.empty(0, kind)

            def take(n: int) -> Array:
                nonlocal held
                parts = [held]
                while (have := sum(p.size for p in parts)) < n:
                    chunk = reader.read(CHUNK * kind.itemsize)
                    if not chunk:
                        raise FormatError(
                            f"{self.path}: {name} has {have} elements left, but {n} are asked for. "
                            "It was written for another merge."
                        )
                    planes = np.frombuffer(chunk, np.uint8).reshape(kind.itemsize, -1)
                    parts.append(np.ascontiguousarray(planes.T).reshape(-1).view(kind))
                whole = np.concatenate(parts)
                held = whole[n:]
                return whole[:n]

            yield take

    @contextmanager
    def _reader(self, name: str) -> Iterator[Any]:
        data = self._file.read(name)[:-DIGEST_BYTES].tobytes()
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            yield _Whole(reader)


class _Whole:
    """A stream whose read gives all that was asked for, but at the end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, n: int) -> bytes:
        parts, left = [], n
        while left and (part := self._stream.read(left)):
            parts.append(part)
            left -= len(part)
        return b"".join(parts)

    def readall(self) -> bytes:
        parts = []
        while part := self._stream.read(1 << 20):
            parts.append(part)
        return b"".join(parts)
