"""An embedding that shares its table with a quantized head: rows looked up in the head's own codes.

GatherBlockQuantized reads what MatMulNBits multiplies by, so that the table is stored once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.export._onnx_edit import MICROSOFT, Edited
from lorasurgery.export._onnx_linear import Linear
from lorasurgery.export._onnx_schemes import Ints

if TYPE_CHECKING:
    from collections.abc import Sequence


def share(edited: Edited, linear: Linear, scheme: Ints, parts: Sequence[Any]) -> bool:
    """Turn the lookups in `linear`'s initializer into ones in `parts`, its codes, scales and zeros.

    False where there is none, or where rows end within a block.
    """
    import numpy as np
    import onnx_ir as ir

    lookups = _lookups(edited, linear)
    if not lookups or linear.shape[1] % scheme.block:
        return False
    codes, *scales = parts
    out, width = linear.shape[0], linear.shape[1] * scheme.bits // 8
    shape = ir.node(
        "Constant", [], {"value": ir.tensor(np.array([out, width]), name=f"{codes.name}.shape")}
    )
    rows = ir.node("Reshape", [codes, shape.outputs[0]], name=f"{codes.name}.rows")
    for node, suffix in ((shape, "shape"), (rows, "rows")):
        node.outputs[0].name = f"{codes.name}.{suffix}"
    edited.graph.insert_before(lookups[0], [shape, rows])
    for node in lookups:
        table, indices = node.inputs
        node.domain, node.op_type = MICROSOFT, "GatherBlockQuantized"
        node.resize_inputs(2 + len(scales))
        for index, value in enumerate([rows.outputs[0], indices, *scales]):
            node.replace_input_with(index, value)
        node.attributes.clear()
        for name, number in (
            ("bits", scheme.bits), ("block_size", scheme.block), ("gather_axis", 0), ("quantize_axis", 1),
        ):  # fmt: skip
            node.attributes[name] = ir.AttrInt64(name, number)
        edited.drop_unused(table)
    return True


def _lookups(edited: Edited, linear: Linear) -> list[Any]:
    """The Gathers of rows of [out, in], all of them or none."""
    found: list[Any] = []
    ways = [(edited.graph.initializers.get(linear.initializer), linear.turned)]
    while ways:
        value, turned = ways.pop()
        for node, index in () if value is None else value.uses():
            if node.op_type == "Transpose" and node.outputs[0].uses():
                ways.append((node.outputs[0], not turned))
            elif node.op_type == "Gather" and not index and not node.attributes.get_int("axis", 0):
                found += [] if turned else [node]
    return found
