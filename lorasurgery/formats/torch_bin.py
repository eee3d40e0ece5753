"""torch.save's files (.bin, .pt, .pth): a zip of a pickle and storages, read without running code.

torch unpickles with weights_only, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.arrays import Array

SUFFIXES = (".bin", ".pt", ".pth")
# where trainers put the weights beside the optimizer's state
_NESTED = ("state_dict", "model_state_dict", "model")
_CODES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16",
    "float32": "F32", "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
# what the restricted unpickler and the zip reader raise on files that are damaged or forged
_BROKEN = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)


class File:
    """A checkpoint in one file, its storages mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self.metadata = _weights(path, _load(path))
        self._infos = {name: _info(path, name, tensor) for name, tensor in self._tensors.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop; only a tensor whose elements do not lie in order is copied."""
        import torch

        from lorasurgery.arrays import NUMPY

        tensor, info = self._tensors[name], self._infos[name]
        part = tensor[start:stop] if info.shape else tensor
        data = part.contiguous().reshape(-1).view(torch.uint8).numpy()
        array: Array = data.view(NUMPY[info.dtype]).reshape(tuple(part.shape))
        array.flags.writeable = False
        return array

    def release(self, name: str) -> None:
        """The storages are torch's mapping: the system takes its clean pages back by itself."""

    def place(self, name: str) -> tuple[Path, int] | None:
        return None

    def storage(self, name: str) -> tuple[str, int]:
        info = self._infos[name]
        return info.dtype, info.nbytes


def open(path: Path) -> File:
    """Open one file: its pickle is read, its data stays on the disk."""
    return File(path)


def _load(path: Path) -> Any:
    """What was saved; files older than torch 1.6 are no zips and cannot be mapped."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols of forged files
            mapped = zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        raise FormatError(
            f"{path}: its pickle asks for {wanted[1] if wanted else 'more than tensors'}, which no "
            "weight needs; nothing of it was run. Use a safetensors file of this model."
        ) from None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the file.") from None
    except _BROKEN:
        raise FormatError(
            f"{path}: cannot be read as a file of torch.save. It is cut short or damaged; download "
            "it again."
        ) from None


def _weights(path: Path, saved: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict, bare or nested in a trainer's checkpoint, and plain values beside it."""
    from torch import Tensor

    if isinstance(saved, dict) and not any(isinstance(v, Tensor) for v in saved.values()):
        saved = next((saved[key] for key in _NESTED if isinstance(saved.get(key), dict)), saved)
    if not isinstance(saved, dict):
        raise FormatError(
            f"{path}: holds a {type(saved).__name__}, not a dict of tensors. Save the state dict."
        )
    tensors = {str(name): v for name, v in saved.items() if isinstance(v, Tensor)}
    plain = {str(name): str(v) for name, v in saved.items() if isinstance(v, str | int | float)}
    left = [(name, v) for name, v in saved.items() if not isinstance(v, Tensor | str | int | float)]
    if left:
        raise FormatError(
            f"{path}: {left[0][0]} is a {type(left[0][1]).__name__}, not a tensor "
            f"({len(left)} such in all). Save the state dict alone."
        )
    return tensors, plain


def _info(path: Path, name: str, tensor: Tensor) -> TensorInfo:
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _CODES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise FormatError(
            f"{path}: {name} is a {tensor.layout} {dtype} tensor on {tensor.device}, which is not "
            "read. Save it dense, in a plain dtype, on the CPU."
        )
    return TensorInfo(name, _CODES[dtype], tuple(tensor.shape))
