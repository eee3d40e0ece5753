"""An ONNX model of one MatMulBnb4, ONNX Runtime's own operator for NF4 weights."""

from __future__ import annotations

from typing import Any

import onnxruntime
from onnx import TensorProto, helper

from lorasurgery.arrays import Array


def session(codes: Array, absmax: Array, shape: tuple[int, int], block: int, threads: int) -> Any:
    """x float32 [1, in] -> y [1, out], for codes uint8 and absmax float32 of W [out, in]."""
    out, in_ = shape
    node = helper.make_node(
        "MatMulBnb4", ["x", "codes", "absmax"], ["y"], domain="com.microsoft",
        K=in_, N=out, block_size=block, quant_type=1, training_mode=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, in_])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, out])],
        [
            helper.make_tensor("codes", TensorProto.UINT8, codes.shape, codes.tobytes(), raw=True),
            helper.make_tensor(
                "absmax", TensorProto.FLOAT, absmax.shape, absmax.tobytes(), raw=True
            ),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
