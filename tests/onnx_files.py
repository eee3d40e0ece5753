"""ONNX files made by the onnx package: products of each shape that exporters write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as h
import safetensors.numpy

IN, MID, OUT = 70, 96, 33


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed + 1000 * sum(shape))
    return (0.05 * rng.standard_normal(shape)).astype(np.float32)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    tensors: Mapping[str, np.ndarray | onnx.TensorProto],
    ends: tuple[int, int],
    **model: Any,
) -> Path:
    """A graph from x float [n, ends[0]] to y float [n, ends[1]]."""
    held = [
        t if isinstance(t, onnx.TensorProto) else onnx.numpy_helper.from_array(t, name)
        for name, t in tensors.items()
    ]
    x, y = (h.make_tensor_value_info(n, 1, ["n", e]) for n, e in zip("xy", ends, strict=True))
    graph = h.make_graph(list(nodes), "g", [x], [y], held)
    settings = {"opset_imports": [h.make_opsetid("", 17)], "ir_version": 8, **model}
    onnx.save(h.make_model(graph, **settings), path)
    return path


def chain(path: Path, **model: Any) -> Path:
    """MatMul with [in, out]; Gemm with transB and a bias; a weight behind a Transpose."""
    nodes = [
        h.make_node("MatMul", ["x", "onnx::MatMul_7"], ["h"], "/layer.0/query/MatMul"),
        h.make_node("Gemm", ["h", "layer.0.key.weight", "b"], ["k"], "/layer.0/key/Gemm", transB=1),
        h.make_node("Transpose", ["layer.0.value.weight"], ["t"], perm=[1, 0]),
        h.make_node("MatMul", ["k", "t"], ["y"], "/layer.0/value/MatMul"),
    ]
    tensors = {
        "onnx::MatMul_7": drawn(IN, MID), "layer.0.key.weight": drawn(OUT, MID), "b": drawn(OUT),
        "layer.0.value.weight": drawn(50, OUT),
    }  # fmt: skip
    return save(path, nodes, tensors, (IN, 50), **model)


def tied(path: Path) -> Path:
    """One square weight: multiplied by as it is, behind an Identity turned, and looked up in."""
    nodes = [
        h.make_node("MatMul", ["x", "layer.0.up.weight"], ["h"], "/layer.0/up/MatMul"),
        h.make_node("Identity", ["layer.0.up.weight"], ["layer.1.up.weight"]),
        h.make_node("Gemm", ["h", "layer.1.up.weight"], ["k"], "/layer.1/up/Gemm", transB=1),
        h.make_node("Gather", ["layer.0.up.weight", "rows"], ["r"], "/gather"),
        h.make_node("Add", ["k", "r"], ["y"], "/add"),
    ]
    tensors = {"layer.0.up.weight": drawn(64, 64), "rows": np.array([3])}
    return save(path, nodes, tensors, (64, 64))


def nameless(path: Path) -> dict[str, np.ndarray]:
    """Two products whose weights and nodes tell no module; the weights."""
    nodes = [
        h.make_node("MatMul", ["x", "one"], ["h"], "first"),
        h.make_node("MatMul", ["h", "two"], ["y"], "second"),
    ]
    weights = {"one": drawn(8, 8), "two": drawn(8, 8, seed=1)}
    save(path, nodes, weights, (8, 8))
    return weights


def run(path: Path, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


RANK, ALPHA = 3, 7.0


def adapter(folder: Path, modules: Mapping[str, tuple[int, int]], **fields: Any) -> Path:
    """A LoRA in PEFT's layout on modules of [out, in]."""
    folder.mkdir()
    held = {}
    for i, (module, (out, in_)) in enumerate(modules.items()):
        held[f"base_model.model.{module}.lora_A.weight"] = drawn(RANK, in_, seed=i + 1)
        held[f"base_model.model.{module}.lora_B.weight"] = drawn(out, RANK, seed=i + 2)
    safetensors.numpy.save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def delta(folder: Path, module: str) -> np.ndarray:
    """The change [out, in] that such an adapter means."""
    held = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
    return ALPHA / RANK * (b @ a)
