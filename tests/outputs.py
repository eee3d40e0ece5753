"""An output of two small tensors: begun, filled, written, or left by a killed run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lorasurgery import place
from lorasurgery.formats._writer import Shard, lay_out
from lorasurgery.output import Output, OutputOptions
from lorasurgery.tensors import TensorInfo

A, B = TensorInfo("a", "F32", (4, 2)), TensorInfo("b", "BF16", (3,))
DATA = {"a": bytes(range(32)), "b": bytes(range(100, 106))}
PLAIN, RESUME = OutputOptions(), OutputOptions(resume=True)
OVERWRITE = OutputOptions(overwrite=True)


def shards(max_shard: int = 1 << 30) -> tuple[Shard, ...]:
    return lay_out([A, B], max_shard, {"format": "pt"})


def begun(path: Path, options: OutputOptions = PLAIN, plan: str = "plan") -> Output:
    return Output(path, shards(), plan, options)


def fill(output: Output, *names: str) -> Output:
    for name in names:
        output.write(name, 0, np.frombuffer(DATA[name], np.uint8))
        output.record(name, {"metrics": {}, "read": {}, "written": {}}, [name])
    return output


def written(path: Path, options: OutputOptions = PLAIN, **files: str) -> None:
    fill(begun(path, options), "a", "b").commit({n: c.encode() for n, c in files.items()})


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, with their bytes."""
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()
    }


def killed(path: Path, *names: str) -> Path:
    """What a killed run leaves: its journal and files, its lock given up by the system."""
    output = fill(begun(path), *names)
    output._close_files()
    output._unlock()
    return place.partial_of(path)
