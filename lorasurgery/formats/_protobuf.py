"""The wire format of protocol buffers, walked in place: field numbers, and where their bytes lie.

https://protobuf.dev/programming-guides/encoding. Nothing is copied: a tensor of a gigabyte costs what its key costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import mmap
from typing import NamedTuple, TypeAlias

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Data: TypeAlias = bytes | mmap


class WireError(ValueError):
    """The bytes are no protocol buffer."""


class Field(NamedTuple):
    """`value` is a varint's; of all others the bytes are data[begin:end]."""

    number: int
    wire: int
    value: int
    begin: int
    end: int


def fields(data: Data, begin: int, end: int) -> Iterator[Field]:
    """The fields of the message in data[begin:end]; raises WireError for what runs over its end."""
    at = begin
    while at < end:
        key, at = varint(data, at, end)
        number, wire = key >> 3, key & 7
        if not number:
            raise WireError(f"field 0 before byte {at}")
        value, size = 0, 0
        start = at
        if wire == VARINT:
            value, at = varint(data, at, end)
        elif wire == BYTES:
            size, start = varint(data, at, end)
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
        else:
            raise WireError(f"wire type {wire} before byte {at}")
        if wire != VARINT:
            at = start + size
        if at > end:
            raise WireError(f"a field of {size} bytes at byte {start} ends behind byte {end}")
        yield Field(number, wire, value, start, at)


def varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """A number of up to 64 bits, and where it ends."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value & ((1 << 64) - 1), at
        shift += 7
    raise WireError(f"a number that does not end by byte {at}")


def signed(value: int) -> int:
    """A varint of type int64."""
    return value - (1 << 64) if value >> 63 else value


def integers(data: Data, f: Field) -> list[int]:
    """A repeated int64: packed, or one of it."""
    if f.wire == VARINT:
        return [signed(f.value)]
    if f.wire != BYTES:
        raise WireError(f"integers of wire type {f.wire}")
    values, at = [], f.begin
    while at < f.end:
        value, at = varint(data, at, f.end)
        values.append(signed(value))
    return values


def text(data: Data, f: Field) -> str:
    """A field's bytes as UTF-8; raises WireError for what is none."""
    try:
        return bytes(data[f.begin : f.end]).decode()
    except UnicodeDecodeError:
        raise WireError(f"a name at byte {f.begin} is no UTF-8") from None


def encoded(number: int, wire: int, payload: bytes | int) -> bytes:
    """One field: a varint, or bytes with their length."""
    head = _varint(number << 3 | wire)
    if isinstance(payload, int):
        return head + _varint(payload & ((1 << 64) - 1))
    return head + (_varint(len(payload)) if wire == BYTES else b"") + payload


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
