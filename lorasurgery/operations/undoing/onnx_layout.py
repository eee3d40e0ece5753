"""An ONNX model's files as they lie: bytes between weights, which are kept, and weights, each by its name.

What is no initializer's raw data (the graph, numbers that are written one by one, room between tensors)
is a record of its own for each file, called `file NAME`; it is small where the weights are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorasurgery.formats.onnx import File
from lorasurgery.operations.undoing.undo_record import recording

CHUNK = 4 << 20


def record_of(file: str) -> str:
    """What the bytes of a file that are no weight's are called."""
    return f"file {file}"


def layout(file: File) -> list[dict[str, Any]]:
    """The model's file and those beside it: name, size, and [initializer, offset, bytes] of each weight."""
    return [
        {"file": name, "size": path.stat().st_size, "weights": [list(w) for w in weights]}
        for name, path, weights in _files(file)
    ]


def keep_layout(file: File, folder: Path) -> list[str]:
    """Record what is no weight of each file; the records' names."""
    names = []
    for name, path, weights in _files(file):
        with recording(folder, record_of(name)) as recorder, path.open("rb") as source:
            for start, stop in between(weights, path.stat().st_size):
                source.seek(start)
                for at in range(start, stop, CHUNK):
                    chunk = source.read(min(CHUNK, stop - at))
                    recorder.whole(np.frombuffer(chunk, np.uint8))
        names.append(record_of(name))
    return names


def _files(file: File) -> Iterator[tuple[str, Path, list[tuple[str, int, int]]]]:
    """(path below the model's directory, path, [(initializer, offset, bytes)]) of each file."""
    home = file.path.parent
    for path in (file.path, *sorted(file.data_files)):
        found = {
            s.offset: (s.name, s.offset, s.nbytes)
            for s in file.header.initializers.values()
            if s.file == path and s.nbytes
        }
        yield str(path.relative_to(home)), path, [found[offset] for offset in sorted(found)]


def between(weights: Sequence[Sequence[Any]], size: int) -> Iterator[tuple[int, int]]:
    """What the weights leave of a file: (start, stop)."""
    at = 0
    for _, offset, nbytes in weights:
        if offset > at:
            yield at, offset
        at = max(at, offset + nbytes)
    if size > at:
        yield at, size
