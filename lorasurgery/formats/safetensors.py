"""safetensors: 8-byte header length, JSON header, then the tensors without gaps.

https://github.com/huggingface/safetensors#format. Reading maps the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError, ShapeError
from lorasurgery.formats._safetensors_header import header_of, named, parse_header, read_header
from lorasurgery.tensors import BITS, TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

SUFFIXES = (".safetensors",)


class File:
    """A checkpoint in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header, self._size = read_header(path)
        self._start = 8 + len(self.header)
        self.metadata, self._infos, self._offsets = parse_header(
            path, self.header, self._size - self._start
        )
        self._map: mmap.mmap | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop as a view of the mapped file; sub-byte dtypes come as uint8 [nbytes].

        Raises ShapeError where rows of a sub-byte dtype do not begin and end with a byte.
        """
        import numpy as np

        from lorasurgery.arrays import NUMPY

        info, (begin, end) = self._infos[name], self._offsets[name]
        shape = info.shape
        if shape:
            first, last, _ = slice(start, stop).indices(shape[0])
            shape = (max(0, last - first), *shape[1:])
            begin, end = _row_bytes(info, begin, first, first + shape[0])
        data = np.frombuffer(self._mapped(name), np.uint8)[self._start + begin : self._start + end]
        if info.dtype not in NUMPY:
            return data
        return _aligned(data, NUMPY[info.dtype]).reshape(shape)

    def release(self, name: str) -> None:
        """Give back the mapped pages of this tensor; a later read maps them again."""
        if self._map is not None:
            begin, end = (self._start + offset for offset in self._offsets[name])
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            if end > begin:
                self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def place(self, name: str) -> tuple[Path, int] | None:
        return self.path, self._start + self._offsets[name][0]

    def storage(self, name: str) -> tuple[str, int]:
        info = self._infos[name]
        return info.dtype, info.nbytes

    def _mapped(self, name: str) -> mmap.mmap:
        if self._map is None:
            with named(self.path), self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(mapped) != self._size:
                raise FormatError(
                    f"{self.path}: {name}: the file had {self._size} bytes when it was opened, and "
                    f"has {len(mapped)} now. Leave it alone, and begin again."
                )
            self._map = mapped
        if self._map.size() < self._size:  # touching what was cut off would kill the process
            raise FormatError(
                f"{self.path}: {name}: the file shrank from {self._size} to {self._map.size()} bytes "
                "while it was read. Restore the file."
            )
        return self._map


def open(path: Path) -> File:
    """Open one file; reads and checks the header alone."""
    return File(path)


def _row_bytes(info: TensorInfo, begin: int, first: int, last: int) -> tuple[int, int]:
    """The bytes of rows first:last of a tensor whose data begins at `begin`."""
    bits = BITS[info.dtype] * (info.numel // max(1, info.shape[0]))
    if first * bits % 8 or last * bits % 8:
        raise ShapeError(
            f"{info}: row {first} or {last} begins within a byte. Read the tensor whole."
        )
    return begin + first * bits // 8, begin + last * bits // 8


def _aligned(data: Array, dtype: Any) -> Array:
    """The bytes as dtype; numpy and numba want addresses that are multiples of the item size."""
    if data.ctypes.data % dtype.alignment:
        data = data.copy()
        data.flags.writeable = False
    return data.view(dtype)


__all__ = ["SUFFIXES", "File", "header_of", "open", "parse_header"]
