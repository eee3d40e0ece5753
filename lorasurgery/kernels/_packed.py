"""An NF4 weight [rows, k] as the matrix kernels take it, and how their programs are laid over it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import double_dequantize, nf4_dequantize, nf4_matvec
from lorasurgery.kernels._tensors import FLOATS, dtype_name

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SECOND = 256  # block scales that share a scale of the second level
FEW = 4  # rows of x that are taken one by one on a GPU
FEW_CPU = 8  # and on a CPU, where unpacking the weight costs as much as this many passes over it


@dataclass(frozen=True)
class Packed:
    """Codes uint8 [ceil(rows · k / 2)]; absmax float32, or uint8 with nested float32 and offset."""

    codes: Any
    absmax: Any
    block: int
    rows: int
    table: Any
    nested: Any
    offset: Any

    @property
    def double(self) -> bool:
        """Whether the scales are quantized themselves."""
        return self.nested is not None


class _Facts(NamedTuple):
    """What is checked of scales, for those that are nested: as they decode."""

    shape: tuple[int, ...]
    ndim: int
    dtype: str


def check(x: Any, w: Packed, bias: Any, kernel: str) -> None:
    """Raises ShapeError unless x [m, k] goes with the weight and the bias."""
    kinds = [dtype_name(t.dtype) for t in (x, *([] if bias is None else [bias]))]
    if x.ndim != 2 or kinds[0] not in FLOATS or kinds[-1] != kinds[0]:
        raise ShapeError(
            f"{kernel}: x is {kinds[0]} {list(x.shape)} and the bias {kinds[-1]}, but [m, in] and "
            f"a bias of one dtype, of {', '.join(FLOATS)}, are needed. Reshape or convert them."
        )
    if bias is not None and tuple(bias.shape) != (w.rows,):
        raise ShapeError(
            f"{kernel}: the bias is {list(bias.shape)}, but the weight has {w.rows} rows. "
            "Is it of another layer?"
        )
    if tuple(w.table.shape) != (16,) or dtype_name(w.table.dtype) != "float32":
        raise ShapeError(
            f"{kernel}: the table is {dtype_name(w.table.dtype)} {list(w.table.shape)}, but "
            "float32 [16] is needed. Restore the file."
        )
    scales = w.absmax
    if w.nested is not None:
        outer = -(-w.absmax.shape[0] // SECOND)
        if (
            dtype_name(w.absmax.dtype) != "uint8" or w.offset is None
            or tuple(w.nested.shape) != (outer,) or dtype_name(w.nested.dtype) != "float32"
        ):  # fmt: skip
            raise ShapeError(
                f"{kernel}: scales {dtype_name(w.absmax.dtype)} {list(w.absmax.shape)} are nested "
                f"in {dtype_name(w.nested.dtype)} {list(w.nested.shape)}, but uint8 [n], float32 "
                f"[ceil(n / {SECOND})] and an offset are needed. Check the quantization state."
            )
        scales = _Facts(w.absmax.shape, w.absmax.ndim, "float32")
    nf4_dequantize.check(w.rows * x.shape[1], w.codes, scales, w.block, kernel)


def dense(w: Packed, k: int, dtype: Any) -> Tensor:
    """The weight in `dtype` [rows, k], in plain torch."""
    scales = w.absmax
    if w.double:
        scales = double_dequantize.reference(w.absmax, w.nested, w.offset)
    n = w.rows * k
    flat = nf4_dequantize.reference(w.codes, scales, w.block, n, dtype, w.table)
    return flat.view(w.rows, k)


def dense_array(w: Packed, k: int, dtype: Any) -> Array:
    """The weight rounded to `dtype`, as float32 [rows, k], by numba."""
    return decoded(w, k, dtype).astype(np.float32, copy=False)


def decoded(w: Packed, k: int, dtype: Any) -> Array:
    """The weight in `dtype` [rows, k], by numba."""
    flat = nf4_dequantize.cpu(w.codes, _scales(w), w.block, w.rows * k, dtype, w.table)
    return flat.reshape(w.rows, k)


def product(x: Array, w: Packed) -> Array:
    """x Wᵀ as float32 [m, rows]: few rows against the codes, many against weights that are unpacked."""
    if len(x) <= FEW_CPU:
        return nf4_matvec.sums(x, w.codes, _scales(w), w.block, w.rows, w.table)
    y: Array = x.astype(np.float32) @ dense_array(w, x.shape[1], x.dtype).T
    return y


def _scales(w: Packed) -> Array:
    """float32, those of the first level."""
    scales: Array = w.absmax
    # an offset of [1] as well as a scalar
    return double_dequantize.cpu(scales, w.nested, w.offset.reshape(())) if w.double else scales


def pointers(w: Packed) -> tuple[Tensor, ...]:
    """What a kernel needs to find the weights; what it will not read is any tensor."""
    nested, offset, levels = w.table, w.table, w.table
    if w.double:
        nested, levels = w.nested.contiguous(), _levels(w.codes.device)
        offset = w.offset.reshape(1)
    return w.codes.contiguous(), w.absmax.contiguous(), w.table.contiguous(), nested, offset, levels


def layout(w: Packed, k: int) -> dict[str, Any]:
    """The constants that say how the weights lie."""
    return {"BLOCK": w.block, "NESTED": SECOND if w.double else 0, "ODD": k % w.block != 0}


@cache
def _levels(device: torch.device) -> Tensor:
    import torch

    return torch.from_numpy(double_dequantize.TABLE.copy()).to(device)
