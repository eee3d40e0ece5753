"""The matrices that an ONNX graph multiplies by, each with the nodes that do, and the module it was.

x W is MatMul with W [in, out] or Gemm with transB and W [out, in]; between the node and the initializer
there may be Transposes and Identities. Read from the header alone.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorasurgery.formats._onnx_header import Header, Node
from lorasurgery.tensors import FLOATS


@dataclass(frozen=True, slots=True)
class Linear:
    """One weight of one module. `turned`: the initializer is [in, out]; `nodes` are indices.

    `alone`: nothing else of the graph uses the initializer; `elsewhere`: something does that is no product.
    """

    module: str
    initializer: str
    turned: bool
    nodes: tuple[int, ...]
    alone: bool
    elsewhere: bool
    shape: tuple[int, int]  # [out, in]


@dataclass(frozen=True, slots=True)
class _Way:
    """From a node's input back to an initializer: the names passed, and whether it is transposed."""

    initializer: str
    names: tuple[str, ...]
    transposed: bool


class Users:
    """Who uses which value of a graph."""

    def __init__(self, header: Header) -> None:
        self._nodes = header.nodes
        self._uses: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(header.nodes):
            for name in (*node.inputs, *node.captured):
                self._uses[name].append(index)
        for name in header.outputs:
            self._uses[name].append(-1)

    def leaves(self, name: str) -> set[int]:
        """The nodes that a value reaches through Transposes and Identities; -1 is a graph's output."""
        found: set[int] = set()
        names, seen = [name], set()
        while names:
            for index in self._uses.get(names.pop(), ()):
                node = self._nodes[index]
                if index < 0 or node.op not in ("Transpose", "Identity"):
                    found.add(index)
                elif index not in seen:
                    seen.add(index)
                    names += node.outputs
        return found


def linears(header: Header) -> list[Linear]:
    """All of them, in the order of their nodes."""
    makers = {output: node for node in header.nodes for output in node.outputs}
    users = Users(header)
    groups: dict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for index, node in enumerate(header.nodes):
        if not _multiplies(node) or (way := _way(header, makers, node.inputs[1])) is None:
            continue
        turned = (node.op == "MatMul" or not node.attributes.get("transB", 0)) != way.transposed
        module = _module(header, node, way)
        groups[module, way.initializer, turned].append(index)
    products: dict[str, set[int]] = defaultdict(set)
    for (_, name, _), nodes in groups.items():
        products[name].update(nodes)
    found = []
    for (module, name, turned), nodes in groups.items():
        rows, columns = header.initializers[name].dims
        elsewhere = bool(users.leaves(name) - products[name])
        alone = not elsewhere and products[name] == set(nodes)
        shape = (columns, rows) if turned else (rows, columns)
        found.append(Linear(module, name, turned, tuple(nodes), alone, elsewhere, shape))
    return _unique(found)


def called(header: Header, linear: Linear) -> set[str]:
    """The names that stand for it in the file: its initializer's, its nodes'."""
    return {linear.initializer, *(header.nodes[i].name for i in linear.nodes)}


def _multiplies(node: Node) -> bool:
    """Whether it is a plain product with its second input, and nothing that would have to be folded in."""
    if len(node.inputs) < 2 or not node.outputs:
        return False
    if node.op == "MatMul":
        return True
    at = node.attributes
    biased = len(node.inputs) > 2 and node.inputs[2]
    plain = at.get("alpha", 1.0) == 1 and (at.get("beta", 1.0) == 1 or not biased)
    return node.op == "Gemm" and plain and not at.get("transA", 0)


def _way(header: Header, makers: Mapping[str, Node], name: str) -> _Way | None:
    names, transposed = [name], False
    while (maker := makers.get(name)) is not None and len(names) < 8:
        perm = maker.attributes.get("perm", (1, 0))
        if maker.op == "Transpose" and perm == (1, 0) and maker.inputs:
            transposed = not transposed
        elif maker.op != "Identity" or not maker.inputs:
            return None
        name = maker.inputs[0]
        names.append(name)
    stored = header.initializers.get(name)
    if stored is None or len(stored.dims) != 2 or stored.type.dtype not in FLOATS:
        return None
    if not header.fixed(name):
        return None
    return _Way(name, tuple(names), transposed)


def _module(header: Header, node: Node, way: _Way) -> str:
    """The module path, by the first that tells it: a weight's name, torch's scopes, the node's name."""
    weight = next((n for n in way.names if n.endswith(".weight") and "::" not in n), None)
    if weight:
        module = re.sub(r"\.(MatMul|Gemm)$", "", weight.removesuffix(".weight"))
    else:
        module = _scope(node.scopes) or _path(node.name) or way.initializer
    if header.producer.startswith("onnxruntime-genai"):
        module = module.replace(".attn.", ".self_attn.")
    return module


def _scope(scopes: str) -> str:
    """`['', 'encoder', 'encoder.layer.0.query', 'linear']` -> encoder.layer.0.query."""
    try:
        path = ast.literal_eval(scopes) if len(scopes) < 4096 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return ""
    return str(path[-2]) if isinstance(path, list) and len(path) > 1 else ""


def _path(name: str) -> str:
    """`/encoder/layer.0/query/MatMul_1` -> encoder.layer.0.query."""
    return ".".join(name.strip("/").split("/")[:-1])


def _unique(found: list[Linear]) -> list[Linear]:
    """Two weights of one module are told apart by their initializers."""
    counts = Counter(linear.module for linear in found)
    return [
        replace(linear, module=f"{linear.module}:{linear.initializer}")
        if counts[linear.module] > 1
        else linear
        for linear in found
    ]
