"""The products of an ONNX graph replaced by ones with packed weights, packed as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import blake3

from lorasurgery.arrays import NUMPY, as_bytes
from lorasurgery.errors import ValueRangeError
from lorasurgery.export._onnx_edit import MICROSOFT, Edited
from lorasurgery.export._onnx_linear import Linear
from lorasurgery.export._onnx_schemes import Ints, Scheme, metrics
from lorasurgery.export._onnx_tied import share
from lorasurgery.report import Result

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.formats.onnx import File


@dataclass(slots=True)
class Packing:
    """One initializer on its way: packed when the first of its parts is asked for, forgotten with the last."""

    file: File
    linear: Linear
    scheme: Scheme
    parts: dict[str, Array] = field(default_factory=dict)
    result: Result | None = None

    def part(self, suffix: str) -> Array:
        if not self.parts:
            self._pack()
        return self.parts.pop(suffix)

    def finish(self) -> Result:
        """The report, of weights that were packed or are now, for nothing."""
        if self.result is None:
            self._pack()
            self.parts.clear()
        assert self.result is not None
        return self.result

    def _pack(self) -> None:
        import numpy as np

        name = self.linear.initializer
        stored = self.file.read(name)
        digest = f"blake3:{blake3.blake3(as_bytes(stored)).hexdigest()}"
        w = np.ascontiguousarray(stored.T if self.linear.turned else stored)
        self.file.release(name)
        if not (np.isfinite(w.min()) and np.isfinite(w.max())):
            raise ValueRangeError(
                f"{self.file.path}: {name} holds values that are not finite. Leave it out with "
                f"--exclude {name}."
            )
        self.parts, error = self.scheme.pack(w)
        nbytes = sum(part.nbytes for part in self.parts.values())
        written = {
            f"{name}.{suffix}": f"blake3:{blake3.blake3(as_bytes(part)).hexdigest()}"
            for suffix, part in self.parts.items()
        }
        facts = metrics(w.size, nbytes, error)
        self.result = Result(self.linear.module, facts, {name: digest}, written)


def replace_products(
    edited: Edited, chosen: list[Linear], scheme: Scheme, *, tied: bool = False
) -> list[Packing]:
    """Change the graph; the weights are packed when it is written. `tied`: embeddings read them too."""
    edited.use_domain()
    packings: dict[tuple[str, bool], tuple[Packing, list[Any]]] = {}
    for linear in chosen:
        key = linear.initializer, linear.turned
        if key not in packings:
            packing = Packing(edited.file, linear, scheme)
            packings[key] = packing, _inputs(edited, linear, packing)
        for index in linear.nodes:
            _replace(edited, edited.nodes[index], scheme, packings[key][1], linear.shape)
        if tied and linear.elsewhere and isinstance(scheme, Ints):
            share(edited, linear, scheme, packings[key][1])
    return [packing for packing, _ in packings.values()]


def _inputs(edited: Edited, linear: Linear, packing: Packing) -> list[Any]:
    """The new initializers of one weight."""
    import onnx_ir as ir

    out, in_ = linear.shape
    like = edited.file.info(linear.initializer).dtype
    types = {
        "U8": ir.DataType.UINT8,
        "like x": ir.DataType.from_numpy(NUMPY[like]),
    }
    shapes = packing.scheme.shapes(out, in_)

    def maker(suffix: str) -> Callable[[], Array]:
        return lambda: packing.part(suffix)

    return [
        edited.add(f"{linear.initializer}.{suffix}", types[kind], shapes[suffix], maker(suffix))
        for suffix, kind in packing.scheme.suffixes.items()
    ]


def _replace(
    edited: Edited, node: Any, scheme: Scheme, inputs: list[Any], shape: tuple[int, int]
) -> None:
    """A MatMul becomes the operator in its place; of a Gemm its addition stays, as an Add."""
    import onnx_ir as ir

    weight = node.inputs[1]
    attributes = scheme.attributes(*shape)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        _turn_into(node, (MICROSOFT, scheme.op), [node.inputs[0], *inputs], attributes)
    else:
        product = ir.node(
            scheme.op, [node.inputs[0], *inputs], attributes, domain=MICROSOFT,
            name=f"{node.name or node.outputs[0].name}.product",
        )  # fmt: skip
        product.outputs[0].name = f"{node.outputs[0].name}.product"
        product.outputs[0].type, product.outputs[0].shape = (
            node.outputs[0].type,
            node.outputs[0].shape,
        )
        edited.graph.insert_before(node, product)
        _turn_into(node, ("", "Add"), [product.outputs[0], bias], {})
    edited.drop_unused(weight)


def _turn_into(
    node: Any, op: tuple[str, str], inputs: list[Any], attributes: Mapping[str, int]
) -> None:
    """The same node, with its outputs and its place, doing something else."""
    import onnx_ir as ir

    node.domain, node.op_type = op
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)
