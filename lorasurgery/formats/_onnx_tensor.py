"""One TensorProto: its name, type and shape, and where its bytes are, in this file or beside it."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lorasurgery.checkpoint import check_inside
from lorasurgery.errors import FormatError
from lorasurgery.formats._protobuf import (
    BYTES,
    VARINT,
    Data,
    Field,
    fields,
    integers,
    text,
)
from lorasurgery.tensors import BITS, TensorInfo


class Type(NamedTuple):
    """What ONNX calls a type, its bits, and the dtype that its tensors are known by here."""

    name: str
    bits: int
    dtype: str | None  # None: its bytes alone


# TensorProto.DataType; safetensors has no name for the integers below a byte
TYPES = {
    1: Type("FLOAT", 32, "F32"), 2: Type("UINT8", 8, "U8"), 3: Type("INT8", 8, "I8"),
    4: Type("UINT16", 16, "U16"), 5: Type("INT16", 16, "I16"), 6: Type("INT32", 32, "I32"),
    7: Type("INT64", 64, "I64"), 8: Type("STRING", 0, None), 9: Type("BOOL", 8, "BOOL"),
    10: Type("FLOAT16", 16, "F16"), 11: Type("DOUBLE", 64, "F64"), 12: Type("UINT32", 32, "U32"),
    13: Type("UINT64", 64, "U64"), 14: Type("COMPLEX64", 64, "C64"),
    15: Type("COMPLEX128", 128, None), 16: Type("BFLOAT16", 16, "BF16"),
    17: Type("FLOAT8E4M3FN", 8, "F8_E4M3"), 18: Type("FLOAT8E4M3FNUZ", 8, "F8_E4M3FNUZ"),
    19: Type("FLOAT8E5M2", 8, "F8_E5M2"), 20: Type("FLOAT8E5M2FNUZ", 8, "F8_E5M2FNUZ"),
    21: Type("UINT4", 4, None), 22: Type("INT4", 4, None), 23: Type("FLOAT4E2M1", 4, "F4"),
    24: Type("FLOAT8E8M0", 8, "F8_E8M0"), 25: Type("UINT2", 2, None), 26: Type("INT2", 2, None),
    27: Type("FLOAT6E2M3", 6, "F6_E2M3"), 28: Type("FLOAT6E3M2", 6, "F6_E3M2"),
}  # fmt: skip
_ELEMENTS = 1 << 62


@dataclass(frozen=True, slots=True)
class Stored:
    """An initializer: where its bytes lie as they are.

    `file` None: they are written one by one, and the message at `message` must be decoded.
    """

    name: str
    type: Type
    dims: tuple[int, ...]
    message: tuple[int, int]
    file: Path | None
    offset: int
    external: bool

    @property
    def nbytes(self) -> int:
        return (math.prod(self.dims) * self.type.bits + 7) // 8

    @property
    def info(self) -> TensorInfo:
        """A type without a name of safetensors' is seen as its bytes, flat."""
        if self.type.dtype is None:
            return TensorInfo(self.name, "U8", (self.nbytes,))
        assert BITS[self.type.dtype] == self.type.bits, self.type
        return TensorInfo(self.name, self.type.dtype, self.dims)


class _Message:
    """The fields of a TensorProto."""

    def __init__(self, data: Data, tensor: Field) -> None:
        self.name, self.kind, self.located, self.typed = "", 0, 0, False
        self.dims: list[int] = []
        self.raw: Field | None = None
        self.entries: dict[str, str] = {}
        for f in fields(data, tensor.begin, tensor.end):
            if f.number == 1:
                self.dims += integers(data, f)
            elif f.number == 2 and f.wire == VARINT:
                self.kind = f.value
            elif f.number == 14 and f.wire == VARINT:
                self.located = f.value
            elif f.number in (4, 5, 6, 7, 10, 11):
                self.typed = True
            elif f.wire == BYTES:
                self._bytes(data, f)

    def _bytes(self, data: Data, f: Field) -> None:
        if f.number == 8:
            self.name = text(data, f)
        elif f.number == 9:
            self.raw = f
        elif f.number == 13:
            pair = {
                g.number: text(data, g) for g in fields(data, f.begin, f.end) if g.wire == BYTES
            }
            self.entries[pair.get(1, "")] = pair.get(2, "")


def read_tensor(path: Path, data: Data, tensor: Field) -> Stored:
    """Raises FormatError for a tensor whose bytes are not there, or belong to no file of the model."""
    found = _Message(data, tensor)
    name, kind, dims = found.name, found.kind, found.dims
    where = f"{path}: {name or 'an initializer without a name'}"
    if kind not in TYPES or any(d < 0 for d in dims) or math.prod(dims) > _ELEMENTS:
        raise FormatError(f"{where}: type {kind} with shape {dims} is no tensor. Export it again.")
    stored = Stored(
        name, TYPES[kind], tuple(dims), (tensor.begin, tensor.end), None, 0, external=False
    )
    if found.located == 1:
        return _outside(where, path, stored, found.entries)
    if (raw := found.raw) is not None:
        _check_size(where, stored, raw.end - raw.begin)
        return Stored(
            name, stored.type, stored.dims, stored.message, path, raw.begin, external=False
        )
    if stored.nbytes and not found.typed:
        raise FormatError(f"{where}: has {list(dims)} elements and no data. Export it again.")
    return stored


def _outside(where: str, path: Path, stored: Stored, entries: dict[str, str]) -> Stored:
    """A tensor whose bytes lie in a file beside the model, or below it."""
    location = entries.get("location", "")
    file = path.parent / location
    parts = Path(location).parts
    if not location.isprintable() or not parts or file == path or ".." in parts or parts[0] == "/":
        raise FormatError(
            f"{where}: its data is said to be in {location!r}, which is no file below {path.parent}. "
            "Export it again."
        )
    if not file.is_file():
        raise FormatError(f"{where}: its data file {location} is missing. Put it beside the model.")
    check_inside(path.parent, file)
    offset = _number(where, entries, "offset", 0)
    length = _number(where, entries, "length", stored.nbytes)
    _check_size(where, stored, length)
    size = file.stat().st_size
    if offset + length > size:
        raise FormatError(
            f"{where}: bytes {offset} to {offset + length} of {location} are its data, but that has "
            f"{size} bytes. Copy the file anew."
        )
    return Stored(
        stored.name, stored.type, stored.dims, stored.message, file, offset, external=True
    )


def _number(where: str, entries: dict[str, str], key: str, default: int) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise FormatError(f"{where}: its {key} is {text!r}, no number of bytes. Export it again.")
    return int(text)


def _check_size(where: str, stored: Stored, nbytes: int) -> None:
    if stored.type.bits and nbytes != stored.nbytes:
        raise FormatError(
            f"{where}: is {stored.type.name} {list(stored.dims)}, {stored.nbytes} bytes, but {nbytes} "
            "are stored. Export it again."
        )


def check_overlaps(path: Path, stored: list[Stored]) -> None:
    """Two tensors may be the same bytes; they may not be parts of each other's."""
    spans = {
        (str(s.file), s.offset, s.offset + s.nbytes): s.name
        for s in stored
        if s.external and s.nbytes
    }
    for (at, name), (then, follower) in itertools.pairwise(sorted(spans.items())):
        if at[0] == then[0] and then[1] < at[2]:
            raise FormatError(
                f"{path}: the data of {name} and of {follower} overlap in {Path(at[0]).name}, at byte "
                f"{then[1]}. Export it again."
            )
