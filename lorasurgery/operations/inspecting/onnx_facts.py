"""What `inspect` says of an ONNX graph beside its tensors."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.export._onnx_linear import linears
from lorasurgery.formats.onnx import File

# operators that multiply by packed weights, and what says how
_QUANTIZED = (
    "com.microsoft::MatMulBnb4",
    "com.microsoft::MatMulNBits",
    "com.microsoft::GatherBlockQuantized",
)
_BNB4 = {0: "fp4", 1: "nf4"}


def graph_facts(stored: Checkpoint) -> dict[str, Any] | None:
    """Inputs, outputs, operators and their versions; None for what is no ONNX file."""
    if not isinstance(stored, File):
        return None
    header = stored.header
    quantized: Counter[str] = Counter()
    for node in header.nodes:
        if node.op in _QUANTIZED:
            at = node.attributes
            bits = (
                _BNB4.get(int(str(at.get("quant_type", 1))))
                if "quant_type" in at
                else f"int{at.get('bits', 4)}"
            )
            quantized[f"{node.op.rpartition(':')[2]} {bits}, blocks of {at.get('block_size')}"] += 1
    return {
        "producer": header.producer,
        "ir_version": header.ir_version,
        "opsets": {domain or "ai.onnx": version for domain, version in header.opsets.items()},
        "inputs": {n: kind for n, kind in header.inputs.items() if n not in stored},
        "outputs": dict(header.outputs),
        "operators": dict(header.operators.most_common()),
        "linear_weights": len({linear.initializer for linear in linears(header)}),
        "quantized_products": dict(quantized),
        "external_files": sorted(file.name for file in stored.data_files),
        "sparse_initializers": header.sparse,
    }  # fmt: skip
