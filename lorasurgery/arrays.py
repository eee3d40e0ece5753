"""Numpy arrays for the dtypes of safetensors; bfloat16 and the 8-bit floats come from ml_dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    A = TypeVar("A", np.ndarray[Any, np.dtype[Any]], Tensor)

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# sub-byte dtypes have no numpy form: their bytes are moved, never operated on
NUMPY: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "I16": np.int16, "U16": np.uint16,
        "I32": np.int32, "U32": np.uint32, "I64": np.int64, "U64": np.uint64,
        "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64,
        "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    }.items()
}  # fmt: skip
CODES = {kind: code for code, kind in NUMPY.items()}


def as_bytes(array: Array) -> Array:
    """The same memory as uint8 [nbytes]; copies only what is not contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def from_torch(tensor: Tensor) -> Array:
    """A CPU tensor as an array over the same memory."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def to_torch(array: Array) -> Tensor:
    """An array as a CPU tensor over the same memory."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(np.ascontiguousarray(array).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array))


def alike(one: A, array: Array) -> A:
    """The array as what `one` is: an array of its dtype, or a tensor on its device."""
    if isinstance(one, np.ndarray):
        return array.astype(one.dtype)
    import torch

    made: A = torch.from_numpy(array).to(one)
    return made
