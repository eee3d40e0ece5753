"""onnxruntime-genai's graphs made to pass onnx.checker: operators that it puts into ONNX's domain, spelled out.

SimplifiedLayerNormalization: y = g x / sqrt(mean(x²) + ε) over the last axis. onnxruntime makes one operator
of it again when it loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import FormatError

if TYPE_CHECKING:
    from lorasurgery.export._onnx_edit import Edited

_NORM = "SimplifiedLayerNormalization"


def spell_out(edited: Edited) -> None:
    """Change the graph. Raises FormatError for a use of the operator that has another meaning."""
    for node in edited.nodes:
        if node.op_type == _NORM and not node.domain:
            _norm(edited, node)


def _norm(edited: Edited, node: Any) -> None:
    import onnx_ir as ir

    x, gain = node.inputs
    if any(o.uses() for o in node.outputs[1:]) or node.attributes.get_int("axis", -1) != -1:
        raise FormatError(
            f"{edited.file.path}: {node.name} is a {_NORM} over other axes than the last, or its scale "
            "is used. Leave the graph as it is."
        )
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    half = gain.dtype if gain.dtype != ir.DataType.FLOAT else None
    made: list[Any] = []

    def add(op: str, inputs: list[Any], attributes: dict[str, Any] | None = None) -> Any:
        one = ir.node(op, inputs, attributes or {}, name=f"{node.name}/{op}_{len(made)}")
        one.outputs[0].name = f"{one.name}/output_0"
        made.append(one)
        return one.outputs[0]

    def constant(value: Any) -> Any:
        return add("Constant", [], {"value": ir.tensor(value)})

    wide = add("Cast", [x], {"to": int(ir.DataType.FLOAT)}) if half else x
    mean = add("ReduceMean", [add("Mul", [wide, wide]), constant(np.array([-1]))])
    root = add("Sqrt", [add("Add", [mean, constant(np.array(epsilon, np.float32))])])
    unit = add("Div", [wide, root])
    last = add("Mul", [add("Cast", [unit], {"to": int(half)}) if half else unit, gain])
    edited.graph.insert_before(node, made)
    old = node.outputs[0]
    name, last.type, last.shape = old.name, old.type, old.shape
    for user, index in list(old.uses()):
        user.replace_input_with(index, last)
    edited.graph.remove(node, safe=True)
    last.name = name
