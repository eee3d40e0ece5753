"""ONNX: a protocol buffer of a graph; its initializers lie in it, or in files beside it.

https://onnx.ai/onnx/repo-docs/IR.html, ExternalData.html. Files are mapped; names, types and shapes come from the header alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError, ShapeError
from lorasurgery.formats._onnx_header import read_header
from lorasurgery.formats._onnx_tensor import Stored, check_overlaps
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

SUFFIXES = (".onnx",)


class File:
    """The initializers of an ONNX model, with the header of its graph."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: dict[Path, mmap.mmap] = {}
        self.header = read_header(path, self._map(path), len(self._map(path)))
        self._stored = self.header.initializers
        check_overlaps(path, list(self._stored.values()))
        self.metadata: Mapping[str, str] = {"producer": self.header.producer}

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def info(self, name: str) -> TensorInfo:
        return self._stored[name].info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop, mapped; integers below a byte come as uint8 [nbytes], F4 too.

        Raises FormatError for strings, ShapeError for rows of a type below a byte.
        """
        import numpy as np

        from lorasurgery.arrays import NUMPY

        stored, info = self._stored[name], self.info(name)
        if stored.file is None:
            data = self._decoded(stored)
        else:
            data = np.frombuffer(
                self._map(stored.file), np.uint8, stored.nbytes, stored.offset
            ) if stored.nbytes else np.empty(0, np.uint8)  # fmt: skip
        if info.dtype not in NUMPY:
            if (start, stop) not in ((0, None), (0, info.shape[0])):
                raise ShapeError(f"{info}: rows may begin within a byte. Read the tensor whole.")
            return data
        kind = NUMPY[info.dtype]
        if data.size and data.ctypes.data % kind.alignment:
            # of unaligned bytes only what is asked for is copied
            row = data.size // info.shape[0] if info.shape else data.size
            first, last, _ = slice(start, stop).indices(info.shape[0] if info.shape else 1)
            rows = data[first * row : max(first, last) * row].copy().view(kind)
            rows.flags.writeable = False
            return (
                rows.reshape(max(0, last - first), *info.shape[1:])
                if info.shape
                else rows.reshape(())
            )
        whole = data.view(kind).reshape(info.shape)
        return whole[start:stop] if info.shape else whole

    def release(self, name: str) -> None:
        """Give back the mapped pages of this tensor."""
        stored = self._stored[name]
        if stored.file is not None and stored.file in self._maps:
            begin = -(-stored.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            end = stored.offset + stored.nbytes
            if end > begin:
                self._maps[stored.file].madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def place(self, name: str) -> tuple[Path, int] | None:
        stored = self._stored[name]
        return None if stored.file is None else (stored.file, stored.offset)

    def storage(self, name: str) -> tuple[str, int]:
        stored = self._stored[name]
        return stored.type.dtype or stored.type.name, stored.nbytes

    @property
    def data_files(self) -> set[Path]:
        """What lies beside the model's own file."""
        return {s.file for s in self._stored.values() if s.external and s.file is not None}

    def mapped(self) -> tuple[mmap.mmap, int]:
        """The model file's own bytes, and how many there are."""
        return self._map(self.path), len(self._map(self.path))

    def _decoded(self, stored: Stored) -> Array:
        """Numbers that are written one by one, as the onnx package reads them."""
        import numpy as np
        import onnx

        if not stored.type.bits:
            raise FormatError(
                f"{self.path}: {stored.name} holds strings, no numbers. Leave it out."
            )
        begin, end = stored.message
        tensor = onnx.TensorProto.FromString(self._map(self.path)[begin:end])
        if stored.type.bits < 8:
            tensor_bytes = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor)).raw_data
        else:
            try:
                tensor_bytes = onnx.numpy_helper.to_array(tensor).tobytes()
            except ValueError as error:
                raise FormatError(
                    f"{self.path}: {stored.name}: {error}. Export it again."
                ) from None
        if len(tensor_bytes) != stored.nbytes:
            raise FormatError(
                f"{self.path}: {stored.name}: is {stored.type.name} {list(stored.dims)}, "
                f"{stored.nbytes} bytes, but {len(tensor_bytes)} are stored. Export it again."
            )
        return np.frombuffer(tensor_bytes, np.uint8)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as opened:
                try:
                    self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                except ValueError:
                    raise FormatError(f"{file}: is empty. Copy it anew.") from None
        mapped = self._maps[file]
        if mapped.size() < len(mapped):  # touching what was cut off would kill the process
            raise FormatError(
                f"{file}: shrank from {len(mapped)} to {mapped.size()} bytes while it was read. "
                "Restore the file."
            )
        return mapped


def open(path: Path) -> File:
    """Open one file; reads and checks the header alone."""
    return File(path)
