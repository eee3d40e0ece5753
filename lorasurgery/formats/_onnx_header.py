"""What an ONNX file says beside its data: graph, operators, and where each initializer's bytes lie.

https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. The file is walked in place: weights are skipped, not read.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lorasurgery.errors import FormatError
from lorasurgery.formats._onnx_tensor import TYPES, Stored, read_tensor
from lorasurgery.formats._protobuf import (
    BYTES,
    VARINT,
    Data,
    Field,
    WireError,
    fields,
    integers,
    signed,
    text,
)

# what a file may nest: the exporters' loops and branches are a few deep
_DEPTH = 16


@dataclass(frozen=True, slots=True)
class Node:
    """An operator of the main graph; attributes are those that are numbers or strings."""

    name: str
    op: str  # with its domain, where that is not ONNX's own: com.microsoft::MatMulBnb4
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, int | float | str | tuple[int, ...]]
    captured: tuple[str, ...]  # names that its subgraphs use
    scopes: str  # the module path that torch's exporter left, or ""


@dataclass(slots=True)
class Header:
    """A model without its data."""

    ir_version: int = 0
    producer: str = ""
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # name -> type and shape, as text
    outputs: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Stored] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)  # subgraphs and functions counted in
    sparse: int = 0

    def fixed(self, initializer: str) -> bool:
        """From IR version 4 on, an initializer that is an input as well may be another at each run."""
        return self.ir_version < 4 or initializer not in self.inputs


def read_header(path: Path, data: Data, size: int) -> Header:
    """Raises FormatError for what is no ONNX model, or lies about itself."""
    header = Header()
    try:
        graphs = 0
        for f in fields(data, 0, size):
            if f.number == 1 and f.wire == VARINT:
                header.ir_version = f.value
            elif f.number == 2 and f.wire == BYTES:
                header.producer = text(data, f)
            elif f.number == 8 and f.wire == BYTES:
                domain, version = _opset(data, f)
                header.opsets[domain] = version
            elif f.number == 7 and f.wire == BYTES:
                graphs += 1
                _read_graph(path, data, f, header)
            elif f.number == 25 and f.wire == BYTES:
                _count(data, f, header, node=7, depth=0)
    except WireError as error:
        raise _broken(path, error) from None
    if graphs != 1 or not header.ir_version:
        raise _broken(path, f"{graphs} graphs, IR version {header.ir_version}")
    return header


def _broken(path: Path, why: object) -> FormatError:
    return FormatError(f"{path}: is no whole ONNX file ({why}). Export it again.")


def _read_graph(path: Path, data: Data, graph: Field, header: Header) -> None:
    for f in fields(data, graph.begin, graph.end):
        if f.wire != BYTES:
            continue
        if f.number == 1:
            header.nodes.append(_node(data, f, header, depth=0))
        elif f.number == 5:
            stored = read_tensor(path, data, f)
            if stored.name in header.initializers:
                raise FormatError(
                    f"{path}: two initializers are called {stored.name}. Export it again."
                )
            header.initializers[stored.name] = stored
        elif f.number in (11, 12):
            name, kind = _value(data, f)
            (header.inputs if f.number == 11 else header.outputs)[name] = kind
        elif f.number == 15:
            header.sparse += 1


def _node(data: Data, node: Field, header: Header, depth: int) -> Node:
    texts: dict[int, list[str]] = {number: [] for number in (1, 2, 3, 4, 7)}
    attributes: dict[str, int | float | str | tuple[int, ...]] = {}
    captured: list[str] = []
    scopes = ""
    for f in fields(data, node.begin, node.end):
        if f.wire != BYTES:
            continue
        if f.number in texts:
            texts[f.number].append(text(data, f))
        elif f.number == 5:
            name, value, graphs = _attribute(data, f)
            if value is not None:
                attributes[name] = value
            for graph in graphs:
                captured += _count(data, graph, header, node=1, depth=depth + 1)
        elif f.number == 9:
            key, value = _pair(data, f)
            scopes = value if key == "pkg.torch.onnx.name_scopes" else scopes
    domain = (texts[7] or [""])[-1]
    op = (texts[4] or [""])[-1]
    full = op if domain in ("", "ai.onnx") else f"{domain}::{op}"
    header.operators[full] += 1
    name = (texts[3] or [""])[-1]
    return Node(name, full, tuple(texts[1]), tuple(texts[2]), attributes, tuple(captured), scopes)


def _count(data: Data, graph: Field, header: Header, node: int, depth: int) -> list[str]:
    """Count the operators of a subgraph or function; the names that they take in."""
    if depth > _DEPTH:
        raise WireError(f"graphs nest deeper than {_DEPTH}")
    used: list[str] = []
    for f in fields(data, graph.begin, graph.end):
        if f.wire == BYTES and f.number == node:
            inner = _node(data, f, header, depth)
            used += [*inner.inputs, *inner.captured]
        elif f.wire == BYTES and f.number == 12 and node == 1:
            used.append(_value(data, f)[0])  # a branch may hand an outer value on
    return used


def _attribute(
    data: Data, attribute: Field
) -> tuple[str, int | float | str | tuple[int, ...] | None, list[Field]]:
    name, value = "", None
    whole: list[int] = []
    graphs: list[Field] = []
    found: int | float | str | None = None
    for f in fields(data, attribute.begin, attribute.end):
        if f.number == 1 and f.wire == BYTES:
            name = text(data, f)
        elif f.number == 2 and f.end - f.begin == 4:
            found = struct.unpack("<f", data[f.begin : f.end])[0]
        elif f.number == 3 and f.wire == VARINT:
            found = signed(f.value)
        elif f.number == 4 and f.wire == BYTES:
            found = bytes(data[f.begin : f.end]).decode(errors="replace")
        elif f.number == 8:
            whole += integers(data, f)
        elif f.number in (6, 11) and f.wire == BYTES:
            graphs.append(f)
    value = tuple(whole) if whole else found
    return name, value, graphs


def _value(data: Data, value: Field) -> tuple[str, str]:
    """A graph's input or output: its name, and its type as text, such as `INT64 [batch, 128]`."""
    name, kind, dims = "", "", None
    for f in fields(data, value.begin, value.end):
        if f.number == 1 and f.wire == BYTES:
            name = text(data, f)
        elif f.number == 2 and f.wire == BYTES:
            for tensor in (g for g in fields(data, f.begin, f.end) if g.number == 1):
                for g in fields(data, tensor.begin, tensor.end):
                    if g.number == 1 and g.wire == VARINT:
                        kind = TYPES[g.value].name if g.value in TYPES else f"type {g.value}"
                    elif g.number == 2 and g.wire == BYTES:
                        dims = [_dim(data, d) for d in fields(data, g.begin, g.end)]
    shape = "" if dims is None else f" [{', '.join(dims)}]"
    return name, f"{kind or 'no tensor'}{shape}"


def _dim(data: Data, dim: Field) -> str:
    for f in fields(data, dim.begin, dim.end):
        if f.number == 1 and f.wire == VARINT:
            return str(signed(f.value))
        if f.number == 2 and f.wire == BYTES:
            return text(data, f)
    return "?"


def _opset(data: Data, opset: Field) -> tuple[str, int]:
    domain, version = "", 0
    for f in fields(data, opset.begin, opset.end):
        if f.number == 1 and f.wire == BYTES:
            domain = text(data, f)
        elif f.number == 2 and f.wire == VARINT:
            version = f.value
    return "" if domain == "ai.onnx" else domain, version


def _pair(data: Data, entry: Field) -> tuple[str, str]:
    found = {
        f.number: text(data, f) for f in fields(data, entry.begin, entry.end) if f.wire == BYTES
    }
    return found.get(1, ""), found.get(2, "")
