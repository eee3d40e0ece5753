"""The undo file of a merge into an ONNX model: its layout, differences to predictions, and what is kept whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np

from lorasurgery.adapter import Adapter
from lorasurgery.arrays import as_bytes
from lorasurgery.checkpoint import SCRATCH
from lorasurgery.export._onnx_edit import Edited
from lorasurgery.export._onnx_merge import Merging, Record
from lorasurgery.formats.onnx import File
from lorasurgery.operations.undoing.onnx_layout import CHUNK, keep_layout, layout
from lorasurgery.operations.undoing.undo_file import Undo, adapter_facts
from lorasurgery.operations.undoing.undo_record import FOLDER, recording
from lorasurgery.place import partial_of, writing


@contextmanager
def keeping_base(
    path: Path,
    edited: Edited,
    merged: Sequence[Merging],
    adapters: Sequence[tuple[Adapter, float]],
) -> Iterator[Callable[[], None]]:
    """Record while the model is written; what is given makes the file of it, and the end gives it its name."""
    folder = partial_of(path) / SCRATCH / FOLDER
    predicted = [one for one in merged if _predicted(edited.file, one)]
    undo = Undo(path, tuple(one.place.initializer for one in predicted), (), {})
    try:
        with writing(path, "the undo file"):
            shutil.rmtree(partial_of(path), ignore_errors=True)
            folder.mkdir(parents=True)
            wholes = [*_lost(edited, merged), *keep_layout(edited.file, folder)]
            for name in wholes:
                if name in edited.file:
                    _keep_whole(edited.file, name, folder)
        for one in predicted:
            one.recording = _differences(folder, one.place.initializer)
        facts = {
            "base": str(edited.file.path),
            "onnx": layout(edited.file),
            "changed": {one.place.initializer: one.name for one in predicted},
            "adapters": adapter_facts(adapters),
        }
        undo = Undo(path, undo.differences, tuple(wholes), facts)
        yield lambda: undo.assemble(partial_of(path))
        undo.publish()
    except BaseException:
        undo.discard()
        raise
    finally:
        shutil.rmtree(partial_of(path), ignore_errors=True)


def _predicted(file: File, one: Merging) -> bool:
    """Whether the base's data is foretold by the merged; numbers written one by one lie in the layout."""
    stored = file.header.initializers[one.place.initializer]
    return one.place.alone and one.whole is None and stored.file is not None


def _lost(edited: Edited, merged: Sequence[Merging]) -> list[str]:
    """Initializers with data that the merged model holds no more."""
    replaced = {one.place.initializer for one in merged if one.place.alone and one.whole}
    stored = edited.file.header.initializers.items()
    gone = {name for name, _ in stored if name not in edited.graph.initializers}
    return [name for name, s in stored if s.file and s.nbytes and name in replaced | gone]


def _keep_whole(file: File, name: str, folder: Path) -> None:
    data = as_bytes(file.read(name))
    with recording(folder, name) as recorder:
        for at in range(0, data.size, CHUNK):
            recorder.whole(np.asarray(data[at : at + CHUNK]))
    file.release(name)


def _differences(folder: Path, name: str) -> Callable[[], AbstractContextManager[Record]]:
    @contextmanager
    def opened() -> Iterator[Record]:
        with recording(folder, name) as recorder:
            yield recorder.difference

    return opened
