"""Some matrices of a checkpoint seen as their transposes: Conv1D's [in, out] as [out, in]."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


class Transposed:
    """A Checkpoint over another; tensors that are not in `turned` are passed through."""

    def __init__(self, source: Checkpoint, turned: AbstractSet[str]) -> None:
        self.source, self.turned, self.path = source, turned, source.path
        self.metadata: Mapping[str, str] = source.metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self.source)

    def __len__(self) -> int:
        return len(self.source)

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def info(self, name: str) -> TensorInfo:
        info = self.source.info(name)
        return replace(info, shape=info.shape[::-1]) if name in self.turned else info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop: columns of the source, copied."""
        if name not in self.turned:
            return self.source.read(name, start, stop)
        return np.ascontiguousarray(self.source.read(name)[:, start:stop].T)

    def release(self, name: str) -> None:
        self.source.release(name)

    def place(self, name: str) -> tuple[Path, int] | None:
        return None if name in self.turned else self.source.place(name)

    def storage(self, name: str) -> tuple[str, int]:
        return self.source.storage(name)
