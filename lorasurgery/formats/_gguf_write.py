"""Laying out a GGUF file: header, key-value pairs, tensor table; the data then arrives in any order.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from lorasurgery.formats._gguf_header import ARRAY, NUMBERS, STRING, TYPES
from lorasurgery.tensors import TensorInfo

Value: TypeAlias = "str | bool | int | float | list[str] | list[int] | list[float]"

ALIGNMENT = 32
_BOOL, _U32, _I32, _F32 = 7, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Tensor:
    """What the table says of one: GGUF's name, ggml's type, shape [..., out, in]."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        _, block, size = TYPES[NUMBERS[self.kind]]
        return math.prod(self.shape) // block * size

    @property
    def info(self) -> TensorInfo:
        """The tensor as bytes: a block type has no dtype of its own here."""
        return TensorInfo(self.name, "U8", (self.nbytes,))


@dataclass(frozen=True, slots=True)
class Layout:
    """The file to be: its header is known, its tensors lie one after another."""

    file: str
    head: bytes
    tensors: tuple[Tensor, ...]

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(tensor.info for tensor in self.tensors)

    @property
    def size(self) -> int:
        return len(self.head) + sum(_padded(tensor.nbytes) for tensor in self.tensors)

    def places(self, path: Path) -> Mapping[str, tuple[int, int]]:
        found, at = {}, len(self.head)
        for tensor in self.tensors:
            found[tensor.name] = (at, at + tensor.nbytes)
            at += _padded(tensor.nbytes)
        return found


def lay_out(file: str, values: Mapping[str, Value], tensors: Sequence[Tensor]) -> Layout:
    """Keys in their order; whole numbers are uint32, in lists int32, and reals float32."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    parts = [head, *(_string(key) + _value(value) for key, value in values.items())]
    at = 0
    for tensor in tensors:
        dims = tensor.shape[::-1]
        parts.append(
            _string(tensor.name)
            + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
            + struct.pack("<IQ", NUMBERS[tensor.kind], at)
        )
        at += _padded(tensor.nbytes)
    head = b"".join(parts)
    return Layout(file, head + bytes(-len(head) % ALIGNMENT), tuple(tensors))


def _padded(size: int) -> int:
    return size + -size % ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Value) -> bytes:
    if isinstance(value, list):
        kind, code = _element(value)
        head = struct.pack("<IIQ", ARRAY, kind, len(value))
        if kind == STRING:
            return head + b"".join(_string(str(text)) for text in value)
        return head + struct.pack(f"<{len(value)}{code}", *value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    return struct.pack("<If", _F32, value)


def _element(values: Sequence[object]) -> tuple[int, str]:
    if values and isinstance(values[0], str):
        return STRING, ""
    return (_F32, "f") if values and isinstance(values[0], float) else (_I32, "i")
