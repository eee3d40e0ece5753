"""safetensors: 8-byte header length, JSON header, then the tensors without gaps.

https://github.com/huggingface/safetensors#format. Reading maps the file; the header is not trusted.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.tensors import BITS, TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

SUFFIXES = (".safetensors",)
MAX_HEADER = 100_000_000  # the limit of the format's own library
MAX_NUMEL = 2**62


class File:
    """A checkpoint in one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._start = 8 + len(self.header)
        self.metadata, self._infos, self._offsets = parse_header(
            path, self.header, path.stat().st_size - self._start
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
        """Rows start:stop as a view of the mapped file; sub-byte dtypes come as uint8 [nbytes]."""
        import numpy as np

        from lorasurgery.arrays import NUMPY

        info, (begin, end) = self._infos[name], self._offsets[name]
        data = np.frombuffer(self._mapped(), np.uint8)[self._start + begin : self._start + end]
        if info.dtype not in NUMPY:
            return data
        whole = _aligned(data, NUMPY[info.dtype]).reshape(info.shape)
        return whole if not info.shape else whole[start:stop]

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

    def _mapped(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if self._map is None:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if size < len(self._map):  # touching what was cut off would kill the process
            raise FormatError(
                f"{self.path}: shrank from {len(self._map)} to {size} bytes while it was read. "
                "Restore the file."
            )
        return self._map


def open(path: Path) -> File:
    """Open one file; reads and checks the header alone."""
    return File(path)


def read_header(path: Path) -> bytes:
    """The JSON header as it stands in the file, padding included."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or not 2 <= length <= min(MAX_HEADER, size - 8):
                raise FormatError(
                    f"{path}: the header claims {length} bytes of a file of {size}. "
                    "The file is cut short, or no safetensors file."
                )
            return file.read(length)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the file.") from None


def parse_header(
    path: Path, header: bytes, data_size: int
) -> tuple[Mapping[str, str], dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Metadata, facts and byte ranges, all checked against each other and the data's size."""
    try:
        entries = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is no valid JSON ({error}). Restore the file.") from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: the header is no JSON object. Restore the file.")
    metadata = entries.pop("__metadata__", {})
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        infos[name], offsets[name] = _entry(path, name, entry)
    _check_cover(path, offsets, data_size)
    return (metadata if isinstance(metadata, dict) else {}), infos, offsets


def header_of(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header for these tensors in this order, padded so that data starts at 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in infos:
        begin, offset = offset, offset + info.nbytes
        entries[info.name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, offset],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _aligned(data: Array, dtype: Any) -> Array:
    """The bytes as dtype; numpy and numba want addresses that are multiples of the item size."""
    return (data if data.ctypes.data % dtype.alignment == 0 else data.copy()).view(dtype)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands in it twice")
    return entries


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [begin, end, *shape]
    except (TypeError, KeyError, ValueError):
        raise FormatError(
            f"{path}: {name}: the header entry lacks dtype, shape or data_offsets. Restore the file."
        ) from None
    if dtype not in BITS:
        raise FormatError(
            f"{path}: {name}: unknown dtype {dtype!r}. Known: {', '.join(BITS)}."
        )
    if any(type(n) is not int or n < 0 for n in whole) or math.prod(shape) > MAX_NUMEL:
        raise FormatError(
            f"{path}: {name}: shape {shape} with offsets {[begin, end]} is impossible. "
            "Restore the file."
        )
    info = TensorInfo(name, dtype, tuple(shape))
    if end - begin != info.nbytes:
        raise FormatError(
            f"{path}: {name}: {dtype} {shape} takes {info.nbytes} bytes, but the header gives it "
            f"{end - begin}. Restore the file."
        )
    return info, (begin, end)


def _check_cover(path: Path, offsets: Mapping[str, tuple[int, int]], size: int) -> None:
    """The tensors must lie side by side and fill the file."""
    reached, last = 0, "the header"
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != reached:
            how = "overlaps" if begin < reached else "leaves a gap after"
            raise FormatError(
                f"{path}: {name} starts at byte {begin} and {how} {last}, which ends at {reached}. "
                "Restore the file."
            )
        reached, last = end, name
    if reached != size:
        how = "is cut short" if reached > size else "has bytes that no tensor owns"
        raise FormatError(
            f"{path}: the tensors take {reached} bytes, but the file holds {size}: it {how}. "
            "Restore the file."
        )
