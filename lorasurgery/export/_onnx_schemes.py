"""How a weight [out, in] is packed for onnxruntime's operators that multiply by quantized weights.

MatMulBnb4 takes NF4 as bitsandbytes packs it; MatMulNBits takes int4 or int8 in blocks of each row.
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from lorasurgery.errors import ValueRangeError
from lorasurgery.export import _onnx_ints

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

Error = tuple[float, float, float]  # Σ (v - w)², Σ w², max |v - w|


class Scheme(Protocol):
    """One operator and its packing."""

    @property
    def op(self) -> str: ...
    @property
    def suffixes(self) -> Mapping[str, str]:
        """The operator's inputs behind x, in order, with their types: a dtype, or 'like x'."""
        ...

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]: ...
    def attributes(self, out: int, in_: int) -> dict[str, int]: ...
    def pack(self, w: Array) -> tuple[dict[str, Array], Error]:
        """The inputs' data for w [out, in], and what was lost."""
        ...


@dataclass(frozen=True, slots=True)
class Nf4:
    """NF4, bit for bit as `lorasurgery quantize` packs it, with its scales as they are."""

    block: int = 64
    op: ClassVar[str] = "MatMulBnb4"

    @property
    def suffixes(self) -> Mapping[str, str]:
        return {"nf4": "U8", "absmax": "like x"}

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        n = out * in_
        return {"nf4": (-(-n // 2),), "absmax": (-(-n // self.block),)}

    def attributes(self, out: int, in_: int) -> dict[str, int]:
        return {"K": in_, "N": out, "block_size": self.block, "quant_type": 1}

    def pack(self, w: Array) -> tuple[dict[str, Array], Error]:
        from lorasurgery.kernels import nf4_error, nf4_quantize

        flat = w.reshape(-1)
        codes, absmax = nf4_quantize.run(flat, self.block)
        scales = absmax.astype(w.dtype)
        error = nf4_error.run(flat, codes, scales.astype(absmax.dtype), self.block)
        return {"nf4": codes, "absmax": scales}, error


@dataclass(frozen=True, slots=True)
class Ints:
    """int4 or int8 with a scale, and unless symmetric a zero point, for each `block` weights of a row."""

    bits: int = 4
    block: int = 32
    symmetric: bool = True
    accuracy: int = 4  # how x is taken: 0 as the kernel likes, 1 float32, 2 float16, 4 int8
    op: ClassVar[str] = "MatMulNBits"

    @property
    def suffixes(self) -> Mapping[str, str]:
        zeros = {} if self.symmetric else {"zeros": "U8"}
        return {f"int{self.bits}": "U8", "scales": "like x", **zeros}

    def shapes(self, out: int, in_: int) -> dict[str, tuple[int, ...]]:
        blocks, a_byte = -(-in_ // self.block), 8 // self.bits
        shapes = {
            f"int{self.bits}": (out, blocks, self.block // a_byte), "scales": (out, blocks),
        }  # fmt: skip
        return shapes if self.symmetric else {**shapes, "zeros": (out, -(-blocks // a_byte))}

    def attributes(self, out: int, in_: int) -> dict[str, int]:
        return {
            "K": in_, "N": out, "bits": self.bits, "block_size": self.block,
            "accuracy_level": self.accuracy,
        }  # fmt: skip

    def pack(self, w: Array) -> tuple[dict[str, Array], Error]:
        import numpy as np

        out, in_ = w.shape
        parts = {
            name: np.empty(shape, np.uint8 if name != "scales" else w.dtype)
            for name, shape in self.shapes(out, in_).items()
        }
        error2 = norm2 = largest = 0.0
        step = max(1, _TILE // in_)
        for start in range(0, out, step):
            rows = slice(start, start + step)
            wide = w[rows].astype(np.float32)
            codes, scales, zeros = _onnx_ints.quantize(
                wide, self.block, self.bits, symmetric=self.symmetric
            )
            parts[f"int{self.bits}"][rows] = _onnx_ints.packed(codes, self.bits)
            parts["scales"][rows] = scales
            if not self.symmetric:
                parts["zeros"][rows] = _onnx_ints.packed(zeros, self.bits)
            lost = _onnx_ints.dequantize(codes, parts["scales"][rows], zeros, in_) - wide
            error2 += float(np.dot(lost.reshape(-1), lost.reshape(-1)))
            norm2 += float(np.dot(wide.reshape(-1), wide.reshape(-1)))
            largest = max(largest, float(np.abs(lost).max(initial=0)))
        return parts, (error2, norm2, largest)


BLOCKS = (16, 32, 64, 128, 256)
_TILE = 1 << 18  # weights, so that what is made of them fits in a cache


def scheme(weights: str, block: int | None, *, symmetric: bool, accuracy: int) -> Scheme:
    """The scheme that a user names; raises ValueRangeError for a block size that its operator lacks."""
    bits = 8 if weights == "int8" else 4
    made: Scheme = (
        Nf4(block or 64) if weights == "nf4" else Ints(bits, block or 32, symmetric, accuracy)
    )
    if block not in (None, *BLOCKS):
        raise ValueRangeError(
            f"--block-size: {block} is none that {made.op} takes ({', '.join(map(str, BLOCKS))}). "
            "Pass one of them."
        )
    return made


def metrics(numel: int, nbytes: int, error: Error) -> dict[str, float]:
    """What a report says of one weight."""
    error2, norm2, largest = error
    return {
        "relative_error": math.sqrt(error2 / norm2) if norm2 else 0.0,
        "max_error": largest,
        "error2": error2,
        "norm2": norm2,
        "parameters": numel,
        "bits_per_parameter": 8 * nbytes / max(1, numel),
    }
