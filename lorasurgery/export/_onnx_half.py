"""Matrices stored as float16 in a graph that computes in float32: each goes through a Cast.

onnxruntime casts once, when it loads. Its CPU kernels have no float16, and graphs in float16 fail there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.errors import ValueRangeError
from lorasurgery.export._onnx_edit import Edited

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def halve(edited: Edited) -> None:
    """Every float32 matrix of the graph. One that float16 cannot hold is an error when it is written."""
    import onnx_ir as ir

    inputs = {value.name for value in edited.graph.inputs}
    for name, value in list(edited.graph.initializers.items()):
        info = edited.file.info(name) if name in edited.file and name not in inputs else None
        if info is None or info.dtype != "F32" or len(info.shape) != 2 or not value.uses():
            continue
        half = edited.add(
            f"{name}.half", ir.DataType.FLOAT16, info.shape, _maker(edited, name)
        )  # fmt: skip
        cast = ir.node("Cast", [half], {"to": int(ir.DataType.FLOAT)}, name=f"{name}.cast")
        cast.outputs[0].name = f"{name}.float"
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        uses: list[tuple[Any, int]] = list(value.uses())
        edited.graph.insert_before(edited.nodes[0], cast)
        for node, index in uses:
            node.replace_input_with(index, cast.outputs[0])
        edited.drop_unused(value)


def _maker(edited: Edited, name: str) -> Callable[[], Array]:
    def make() -> Array:
        w = edited.file.read(name)
        with np.errstate(over="ignore"):
            half: Array = w.astype(np.float16)
        edited.file.release(name)
        if not np.isfinite(half).all():
            raise ValueRangeError(
                f"{edited.file.path}: {name} holds values up to {float(np.abs(w).max()):g}, which float16 "
                "does not reach. Pass --weights fp32."
            )
        return half

    return make
