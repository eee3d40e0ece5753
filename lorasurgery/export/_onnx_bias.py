"""The biases of a graph's products: Gemm's C, or what is added to a MatMul's result; whatever they are called."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from lorasurgery.export._onnx_linear import Linear, Users
from lorasurgery.formats._onnx_header import Header, Node
from lorasurgery.tensors import FLOATS


@dataclass(frozen=True, slots=True)
class Bias:
    """A vector [out] of one module: its initializer, and (node, input) of those that add it."""

    module: str
    initializer: str
    size: int
    inputs: tuple[tuple[int, int], ...]
    alone: bool


def biases(header: Header, users: Users, found: list[Linear]) -> list[Bias]:
    """Those of modules that add the same vector after each of their products."""
    makers = {output: node for node in header.nodes for output in node.outputs}
    adders = defaultdict(list)
    for index, node in enumerate(header.nodes):
        for name in node.inputs:
            adders[name].append(index)
    made = []
    for linear in found:
        places = [_place(header, adders, index) for index in linear.nodes]
        inputs = tuple(place for place in places if place)
        names = {_stored(makers, header.nodes[index].inputs[at]) for index, at in inputs}
        name = next(iter(names), "")
        if len(inputs) < len(places) or len(names) != 1 or not _fits(header, name, linear):
            continue
        alone = users.leaves(name) == {index for index, _ in inputs}
        made.append(Bias(linear.module, name, linear.shape[0], inputs, alone))
    return made


def _place(header: Header, adders: Mapping[str, list[int]], index: int) -> tuple[int, int] | None:
    """Where a product's bias comes in."""
    node = header.nodes[index]
    if node.op == "Gemm":
        return (index, 2) if len(node.inputs) > 2 and node.inputs[2] else None
    by = adders.get(node.outputs[0], [])
    if len(by) != 1 or header.nodes[by[0]].op != "Add":
        return None
    first, _ = header.nodes[by[0]].inputs
    return by[0], 1 if first == node.outputs[0] else 0


def _stored(makers: Mapping[str, Node], name: str) -> str:
    """Through what torch's older exporter puts before a tensor that is equal to another."""
    for _ in range(8):
        maker = makers.get(name)
        if maker is None or maker.op != "Identity" or not maker.inputs:
            break
        name = maker.inputs[0]
    return name


def _fits(header: Header, name: str, linear: Linear) -> bool:
    stored = header.initializers.get(name)
    return (
        stored is not None
        and header.fixed(name)
        and stored.dims == (linear.shape[0],)
        and stored.type.dtype in FLOATS
    )
