"""The header of a GGUF file: magic, version, key-value pairs, tensor table; every number checked.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Only the standard library, so that
`inspect` stays quick; arrays (vocabularies of 100 000 strings) are walked, and decoded when asked
for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lorasurgery.errors import FormatError

Buffer: TypeAlias = "bytes | memoryview"
Scalar: TypeAlias = "int | float | bool | str"

# ggml type number -> name, elements in a block, bytes of a block
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
NUMBERS = {name: number for number, (name, _, _) in TYPES.items()}
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
MAX_DIMS = 4
MAX_NUMEL = 2**62


@dataclass(frozen=True, slots=True)
class Array:
    """Where an array of the header lies: element type, count, offset of its first element."""

    kind: int
    count: int
    start: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table; shape [..., out, in], offset from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    values: dict[str, Scalar | Array]
    tensors: dict[str, Tensor]


class Cursor:
    """A place in a header that never runs over its end."""

    def __init__(self, where: str, data: Buffer, start: int = 0) -> None:
        self.where, self.data, self.at = where, data, start

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Little-endian values by their struct letters."""
        begin = self._step(struct.calcsize("<" + layout))
        return struct.unpack_from("<" + layout, self.data, begin)

    def string(self) -> str:
        (length,) = self.numbers("Q")
        begin = self._step(length)
        try:
            return bytes(self.data[begin : self.at]).decode()
        except UnicodeDecodeError:
            raise FormatError(
                f"{self.where}: the string at byte {begin} is not UTF-8. Restore the file."
            ) from None

    def skip_strings(self, count: int) -> None:
        """Walk over strings: this loop decides how long a large vocabulary takes to open."""
        unpack, data, at, end = struct.Struct("<Q").unpack_from, self.data, self.at, len(self.data)
        for _ in range(count):
            if at + 8 > end:
                at += 8
                break
            at += 8 + unpack(data, at)[0]
        self._step(at - self.at)

    def value(self) -> Scalar | Array:
        (kind,) = self.numbers("I")
        if kind in SCALARS:
            return self.numbers(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self._array()
        raise FormatError(f"{self.where}: holds a value of unknown type {kind}. Restore the file.")

    def _array(self) -> Array:
        kind, count = self.numbers("IQ")
        if kind not in SCALARS and kind != STRING:
            raise FormatError(
                f"{self.where}: holds an array of type {kind}, not of numbers or strings. "
                "Restore the file."
            )
        array = Array(kind, count, self.at)
        if kind == STRING:
            self._fits(8 * count)
            self.skip_strings(count)
        else:
            self._step(count * struct.calcsize(SCALARS[kind]))
        return array

    def _fits(self, size: int) -> None:
        if self.at + size > len(self.data):
            raise FormatError(
                f"{self.where}: needs {size} bytes at byte {self.at}, but the file ends at "
                f"{len(self.data)}. It is cut short or damaged; download it again."
            )

    def _step(self, size: int) -> int:
        """Where the next `size` bytes begin; the cursor moves behind them."""
        self._fits(size)
        begin, self.at = self.at, self.at + size
        return begin


def parse(path: Path, data: Buffer) -> Header:
    """The header of a whole file, as mapped; the tensors' bytes are not looked at."""
    cursor = Cursor(str(path), data)
    n_tensors, n_values = _counts(path, cursor)
    values: dict[str, Scalar | Array] = {}
    for _ in range(n_values):
        cursor.where = f"{path}: header"
        key = cursor.string()
        if key in values:
            raise FormatError(f"{path}: the key {key!r} stands in it twice. Restore the file.")
        cursor.where = f"{path}: {key}"
        values[key] = cursor.value()
    cursor.where = f"{path}: tensor table"
    rows = [_row(path, cursor) for _ in range(n_tensors)]
    alignment = _alignment(path, values)
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for row in rows:
        if row.name in tensors:
            raise FormatError(f"{path}: {row.name} stands in it twice. Restore the file.")
        tensors[row.name] = _placed(path, row, start, alignment)
    _check_places(path, tensors, len(data))
    return Header(values, tensors)


def elements(path: Path, data: Buffer, array: Array) -> Iterator[Scalar]:
    """The elements of an array that `parse` walked over."""
    cursor = Cursor(str(path), data, array.start)
    if array.kind != STRING:
        return iter(cursor.numbers(f"{array.count}{SCALARS[array.kind]}"))
    return (cursor.string() for _ in range(array.count))


def _counts(path: Path, cursor: Cursor) -> tuple[int, int]:
    """Numbers of tensors and of key-value pairs, small enough to be walked."""
    if bytes(cursor.data[:4]) != b"GGUF":
        raise FormatError(
            f"{path}: starts with {bytes(cursor.data[:4])!r}, not with b'GGUF'. It is no GGUF file."
        )
    cursor.at = 4
    (version,) = cursor.numbers("I")
    if version not in VERSIONS:
        raise FormatError(
            f"{path}: GGUF version {version}; {VERSIONS[0]} and {VERSIONS[1]}, little-endian, are "
            "read. Convert the file with a current llama.cpp."
        )
    n_tensors, n_values = cursor.numbers("QQ")
    # a pair takes 13 bytes at least, a tensor 24
    if 24 * n_tensors + 13 * n_values > len(cursor.data):
        raise FormatError(
            f"{path}: claims {n_tensors} tensors and {n_values} values in {len(cursor.data)} bytes."
            " It is cut short or damaged; download it again."
        )
    return n_tensors, n_values


def _alignment(path: Path, values: dict[str, Scalar | Array]) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise FormatError(
            f"{path}: general.alignment is {alignment}, not a power of two. Restore the file."
        )
    return alignment


def _row(path: Path, cursor: Cursor) -> Tensor:
    """One row of the tensor table, its offset still counted from the start of the data."""
    name = cursor.string()
    (n_dims,) = cursor.numbers("I")
    if n_dims > MAX_DIMS:
        raise FormatError(
            f"{path}: {name} has {n_dims} dimensions, at most {MAX_DIMS} are allowed."
        )
    shape = cursor.numbers(f"{n_dims}Q")[::-1]
    kind, offset = cursor.numbers("IQ")
    if kind not in TYPES:
        raise FormatError(f"{path}: {name} is of unknown type {kind}. Update lorasurgery.")
    kind_name, block, size = TYPES[kind]
    numel = math.prod(shape)
    if not 1 <= numel <= MAX_NUMEL or (shape[-1:] or (1,))[0] % block:
        raise FormatError(
            f"{path}: {name}: {kind_name} {list(shape)} is impossible: rows come in blocks of "
            f"{block}. Restore the file."
        )
    return Tensor(name, kind_name, shape, offset, numel // block * size)


def _placed(path: Path, row: Tensor, start: int, alignment: int) -> Tensor:
    if row.offset % alignment:
        raise FormatError(
            f"{path}: {row.name} starts at byte {row.offset} of the data, not at a multiple of "
            f"{alignment}. Restore the file."
        )
    return Tensor(row.name, row.kind, row.shape, start + row.offset, row.nbytes)


def _check_places(path: Path, tensors: dict[str, Tensor], size: int) -> None:
    """No tensor may overlap another or reach over the file's end."""
    reached, last = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        end = tensor.offset + tensor.nbytes
        if tensor.offset < reached:
            raise FormatError(
                f"{path}: {tensor.name} starts at byte {tensor.offset} and overlaps {last}, which "
                f"ends at {reached}. Restore the file."
            )
        if end > size:
            raise FormatError(
                f"{path}: {tensor.name} ends at byte {end}, but the file at {size}. It is cut "
                "short; download it again."
            )
        reached, last = end, tensor.name
