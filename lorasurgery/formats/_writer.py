"""Write one file whose tensors are announced first and then arrive in any order."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorasurgery.arrays import Array
from lorasurgery.errors import FormatError
from lorasurgery.formats._safetensors_header import header_of, parse_header
from lorasurgery.tensors import BITS, TensorInfo

_SYNC_FILE_RANGE_WRITE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_COPY_CHUNK = 64 << 20


class Layout(Protocol):
    """One file to be: its name, its first bytes, its size, and where its tensors go."""

    @property
    def file(self) -> str: ...
    @property
    def infos(self) -> tuple[TensorInfo, ...]: ...
    @property
    def head(self) -> bytes: ...
    @property
    def size(self) -> int: ...
    def places(self, path: Path) -> Mapping[str, tuple[int, int]]:
        """First byte and end of each tensor; `path` is for errors."""
        ...


@dataclass(frozen=True, slots=True)
class Shard:
    """A safetensors file: its header (without the 8 length bytes) and its tensors."""

    file: str
    header: bytes
    infos: tuple[TensorInfo, ...]

    @property
    def head(self) -> bytes:
        """The first bytes of the file."""
        return len(self.header).to_bytes(8, "little") + self.header

    @property
    def size(self) -> int:
        return 8 + len(self.header) + sum(info.nbytes for info in self.infos)

    def places(self, path: Path) -> Mapping[str, tuple[int, int]]:
        start = 8 + len(self.header)
        _, _, offsets = parse_header(path, self.header, self.size - start)
        return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


def lay_out(
    infos: Iterable[TensorInfo], max_shard: int, metadata: Mapping[str, str]
) -> tuple[Shard, ...]:
    """Tensors in their order into files of at most max_shard bytes, named as Hugging Face does."""
    groups: list[list[TensorInfo]] = [[]]
    room = max_shard
    for info in infos:
        if groups[-1] and info.nbytes > room:
            groups.append([])
            room = max_shard
        groups[-1].append(info)
        room -= info.nbytes
    return tuple(
        Shard(_file_name(i, len(groups)), header_of(group, metadata), tuple(group))
        for i, group in enumerate(map(_widest_first, groups), 1)
    )


def _file_name(i: int, n: int) -> str:
    return "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"


def _widest_first(infos: Sequence[TensorInfo]) -> list[TensorInfo]:
    """Wider dtypes first, so that every tensor starts at a multiple of its item size."""
    return sorted(infos, key=lambda info: -BITS[info.dtype])


class Writer:
    """A preallocated file; `write` and `copy` may come from several threads."""

    def __init__(self, folder: Path, shard: Layout, *, resume: bool) -> None:
        self.path, self.shard = folder / shard.file, shard
        places = shard.places(self.path)
        self._begin = {name: begin for name, (begin, _) in places.items()}
        self._end = {name: end for name, (_, end) in places.items()}
        flags = os.O_RDWR | os.O_CLOEXEC | (0 if resume else os.O_CREAT | os.O_EXCL)
        self._fd = os.open(self.path, flags, 0o644)
        if not resume:
            try:
                _reserve(self._fd, shard.size)
                self._put(shard.head, 0)
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, name: str, offset: int, data: Array) -> None:
        """Put uint8 data at this byte offset of the tensor."""
        self._put(data, self._begin[name] + offset)

    def copy(self, name: str, source: Path, at: int) -> None:
        """Fill the tensor from another file, without the bytes passing through this process.

        Raises FormatError where the source ends before the tensor does.
        """
        end, target = self._end[name], self._begin[name]
        with source.open("rb") as file:
            while target < end:
                n = _copy_range(file.fileno(), self._fd, min(end - target, _COPY_CHUNK), at, target)
                if n == 0:
                    raise FormatError(
                        f"{source}: ends within {name}: it shrank while it was read. "
                        "Restore the file."
                    )
                at, target = at + n, target + n

    def start_writeback(self, name: str) -> None:
        """Ask the system to begin writing this tensor to the disk."""
        begin, length = self._begin[name], self._end[name] - self._begin[name]
        if length and hasattr(_LIBC, "sync_file_range"):  # a length of 0 would mean: to the end
            _LIBC.sync_file_range(
                self._fd, ctypes.c_int64(begin), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE
            )

    def close(self, *, durable: bool = False) -> None:
        try:
            if durable:
                os.fsync(self._fd)
        finally:
            os.close(self._fd)

    def _put(self, data: Array | bytes, at: int) -> None:
        view = memoryview(data)
        while view:
            n = os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n


def _reserve(fd: int, size: int) -> None:
    """Take the room now: a full disk shows here, not after an hour."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:  # not every file system can
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


# what says: not between these two files, and not: the disk is bad or full
_NO_RANGE_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


def _copy_range(source: int, target: int, length: int, at: int, to: int) -> int:
    """Copy some bytes, at most `length`; 0 where the source ends."""
    try:
        # some file systems answer 0 though there is more: then read shows what is true
        if n := os.copy_file_range(source, target, length, at, to):
            return n
    except OSError as error:
        if error.errno not in _NO_RANGE_COPY:
            raise
    return os.pwrite(target, os.pread(source, min(length, 1 << 20), at), to)
