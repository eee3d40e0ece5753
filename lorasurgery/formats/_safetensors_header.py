"""The header of safetensors: read, checked in every number, and written. It is never trusted."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from lorasurgery.errors import FormatError
from lorasurgery.tensors import BITS, TensorInfo

MAX_HEADER = 100_000_000  # the limit of the format's own library
# what numpy can describe: an array of 8-byte items of these many elements
MAX_NUMEL = 2**59
MAX_DIMENSIONS = 64


def read_header(path: Path) -> tuple[bytes, int]:
    """The JSON header as it stands in the file, padding included; and the file's size."""
    with named(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise FormatError(
                f"{path}: the header claims {length} bytes of a file of {size}. "
                "The file is cut short, or no safetensors file."
            )
        return file.read(length), size


def parse_header(
    path: Path, header: bytes, data_size: int
) -> tuple[Mapping[str, str], dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    """Metadata, facts and byte ranges, all checked against each other and the data's size."""
    try:
        entries = json.loads(header.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise FormatError(f"{path}: the header nests too deep. Restore the file.") from None
    except ValueError as error:
        raise FormatError(
            f"{path}: the header is no valid JSON ({error}). Restore the file."
        ) from None
    if not isinstance(entries, dict):
        raise FormatError(f"{path}: the header is no JSON object. Restore the file.")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            f"{path}: __metadata__ is no object of strings: {_short(metadata)}. Restore the file."
        )
    infos: dict[str, TensorInfo] = {}
    offsets: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        _check_name(path, name)
        infos[name], offsets[name] = _entry(path, name, entry)
    _check_cover(path, offsets, data_size)
    return metadata, infos, offsets


def header_of(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The header for these tensors in this order, padded so that data starts at 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for info in infos:
        if info.name == "__metadata__" or info.name in entries:
            raise FormatError(
                f"{info}: safetensors has no room for a tensor of this name. Rename it."
            )
        begin, offset = offset, offset + info.nbytes
        entries[info.name] = {
            "dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, offset],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """What the system says of a file, as an error that names it."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the file.") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{twice!r} stands in it {times} times")
    return entries


def _check_name(path: Path, name: str) -> None:
    """A name is shown in errors and reports, and written out again."""
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise FormatError(
            f"{path}: the name {_short(name)} holds control characters or half a surrogate "
            "pair. Restore the file."
        )


def _entry(path: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError):
        raise FormatError(
            f"{path}: {name}: the header entry lacks dtype, shape or data_offsets. Restore the file."
        ) from None
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FormatError(
            f"{path}: {name}: unknown dtype {_short(dtype)}. Known: {', '.join(BITS)}."
        )
    if not (_is_shape(shape) and _is_sizes(offsets) and len(offsets) == 2):
        raise FormatError(
            f"{path}: {name}: shape {_short(shape)} with offsets {_short(offsets)} is "
            "impossible. Restore the file."
        )
    info, (begin, end) = TensorInfo(name, dtype, tuple(shape)), offsets
    if info.numel * BITS[dtype] % 8:
        raise FormatError(f"{path}: {name}: {dtype} {shape} ends within a byte. Restore the file.")
    if end - begin != info.nbytes:
        raise FormatError(
            f"{path}: {name}: {dtype} {shape} takes {info.nbytes} bytes, but the header gives it "
            f"{end - begin}. Restore the file."
        )
    return info, (begin, end)


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _is_shape(value: object) -> TypeGuard[list[int]]:
    if not _is_sizes(value) or len(value) > MAX_DIMENSIONS:
        return False
    # as numpy counts: an empty tensor may not have huge dimensions either
    return math.prod(max(1, n) for n in value) <= MAX_NUMEL


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
