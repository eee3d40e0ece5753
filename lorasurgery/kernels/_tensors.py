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
    seen = _borrowed if _dealt_out() else from_torch
    result = cpu(*(_array(arg, seen) for arg in args))
    return tuple(map(_tensor, result)) if isinstance(result, tuple) else _tensor(result)


def dtype_name(dtype: Dtype) -> str:
    """'bfloat16' for numpy's and for torch's."""
    return str(dtype).removeprefix("torch.")


def carrier(tensor: Tensor) -> Tensor:
    """A bfloat16 as the int16 of its bits: kernels round it by integer arithmetic, wherever they run."""
    import torch

    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


def _array(arg: Any, seen: Callable[[Tensor], Array]) -> Any:
    if is_tensor(arg):
        return seen(arg.detach())
    # by its type: a table's own name would be all its numbers
    is_dtype = (type(arg).__module__, type(arg).__name__) == ("torch", "dtype")
    return FLOATS[dtype_name(arg)] if is_dtype else arg


def _tensor(result: Any) -> Any:
    if isinstance(result, np.ndarray):
        return to_torch(result)
    return to_torch(result.reshape(1)).reshape(()) if isinstance(result, np.generic) else result


def _dealt_out() -> bool:
    """Whether FSDP2 may take a tensor's memory away between uses, and bring it back."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized()


def _borrowed(tensor: Tensor) -> Array:
    """As `from_torch`, but torch does not learn of it: it forbids to free what numpy has seen."""
    import torch

    if not tensor.numel():
        return from_torch(tensor)
    whole = tensor.contiguous()
    brain = whole.dtype == torch.bfloat16
    seen = whole.view(torch.uint16) if brain else whole
    array = np.asarray(_Memory(seen))
    return array.view(ml_dtypes.bfloat16) if brain else array


class _Memory:
    """numpy's array interface of a contiguous tensor, which it keeps alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.__array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": tuple(tensor.shape),
            "typestr": np.dtype(dtype_name(tensor.dtype)).str,
            "version": 3,
        }
