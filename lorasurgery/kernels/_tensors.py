"""The one dispatch of all kernels: arrays and CPU tensors to numba, CUDA tensors to the GPU's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np

from lorasurgery.arrays import Array, from_torch, to_torch

if TYPE_CHECKING:
    from torch import Tensor

Data = TypeVar("Data", Array, "Tensor")  # results are of the kind that came in
Dtype: TypeAlias = Any  # a numpy dtype for arrays, torch's for tensors

FLOATS = {np.dtype(k).name: np.dtype(k) for k in (ml_dtypes.bfloat16, np.float16, np.float32)}


def is_tensor(data: Any) -> bool:
    """Whether it is torch's; asked without importing torch."""
    return not isinstance(data, np.ndarray) and hasattr(data, "is_cuda")


def dispatch(cpu: Callable[..., Any], gpu: Callable[..., Any], *args: Any) -> Any:
    """`cpu` on arrays (over a tensor's own memory), `gpu` on CUDA tensors."""
    if not is_tensor(args[0]):
        return cpu(*args)
    if args[0].is_cuda:
        return gpu(*args)
    result = cpu(*map(_array, args))
    return tuple(map(_tensor, result)) if isinstance(result, tuple) else _tensor(result)


def dtype_name(dtype: Dtype) -> str:
    """'bfloat16' for numpy's and for torch's."""
    return str(dtype).removeprefix("torch.")


def _array(arg: Any) -> Any:
    if is_tensor(arg):
        return from_torch(arg.detach())
    # by its type: a table's own name would be all its numbers
    is_dtype = (type(arg).__module__, type(arg).__name__) == ("torch", "dtype")
    return FLOATS[dtype_name(arg)] if is_dtype else arg


def _tensor(result: Any) -> Any:
    if isinstance(result, np.ndarray):
        return to_torch(result)
    return to_torch(result.reshape(1)).reshape(()) if isinstance(result, np.generic) else result
