"""GGUF: llama.cpp's one-file models, presented under Hugging Face's names and in its row order.

Opening reads the header. Quantized tensors are float32 to the reader; the `gguf` package decodes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError
from lorasurgery.formats import _gguf_header as header
from lorasurgery.formats import _gguf_names as names
from lorasurgery.tensors import BITS, TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

SUFFIXES = (".gguf",)
CHUNK = 1 << 18  # elements decoded at once: the temporaries stay in the cache


class File:
    """A checkpoint in one GGUF file.

    Attributes:
        values: the header's key-value pairs; arrays come from `array`.
        architecture: general.architecture, such as "llama".
        family: how it is mapped, or None: then the tensors keep their GGUF names.
        unmapped: tensors that the family does not know and that keep their GGUF names.
        computed: tensors that belong to the config (rope_freqs) and are not presented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _mapped(path)
        with memoryview(self._map) as data:
            parsed = header.parse(path, data)
        self.values = parsed.values
        _refuse_parts(path, self.values)
        self.architecture = str(self.values.get("general.architecture", ""))
        self.family = _family(self.architecture, self.values)
        self.computed = {name: t for name, t in parsed.tensors.items() if names.is_computed(name)}
        self._tensors: dict[str, header.Tensor] = {}
        self.unmapped: list[str] = []
        for tensor in parsed.tensors.values():
            self._add(tensor)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The general.* facts: name, licence, where it comes from."""
        return {
            key: str(value)
            for key, value in self.values.items()
            if key.startswith("general.") and not isinstance(value, header.Array)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.kind if tensor.kind in BITS else "F32", tensor.shape)

    def storage(self, name: str) -> tuple[str, int]:
        return self._tensors[name].kind, self._tensors[name].nbytes

    def place(self, name: str) -> tuple[Path, int] | None:
        tensor = self._tensors[name]
        if tensor.kind not in BITS or self._paired_heads(tensor) is not None:
            return None
        return self.path, tensor.offset

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop, decoded, in transformers' order; plain types are views of the file."""
        import numpy as np

        tensor = self._tensors[name]
        self._check_size()
        data = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        if not tensor.shape:
            return _decode(data, tensor.kind).reshape(())
        n_rows = tensor.shape[0]
        rows = data.reshape(n_rows, tensor.nbytes // n_rows)
        first, last, _ = slice(start, stop).indices(n_rows)
        heads = self._paired_heads(tensor)
        if heads is None:
            rows = rows[first:last]
        else:
            rows = rows[names.paired_rows(first, last, n_rows // heads)]
        return _decode(rows, tensor.kind).reshape(-1, *tensor.shape[1:])

    def release(self, name: str) -> None:
        """Give back the mapped pages of this tensor; a later read maps them again."""
        tensor = self._tensors[name]
        begin = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = tensor.offset + tensor.nbytes
        if end > begin:
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def array(self, key: str) -> list[header.Scalar] | None:
        """An array of the header, such as tokenizer.ggml.tokens, or None if it is not there."""
        value = self.values.get(key)
        if not isinstance(value, header.Array):
            return None
        with memoryview(self._map) as data:
            return list(header.elements(self.path, data, value))

    def raw(self, tensor: header.Tensor) -> bytes:
        """The bytes of a tensor as they lie in the file."""
        self._check_size()
        return self._map[tensor.offset : tensor.offset + tensor.nbytes]

    def _add(self, tensor: header.Tensor) -> None:
        if tensor.name in self.computed:
            return
        name = names.hugging_face(tensor.name, self.family) if self.family else tensor.name
        if name is None:
            self.unmapped.append(tensor.name)
            name = tensor.name
        if name in self._tensors:
            raise FormatError(
                f"{self.path}: {tensor.name} and {self._tensors[name].name} are both {name}. "
                "Restore the file."
            )
        self._tensors[name] = tensor
        heads = self._paired_heads(tensor)
        if heads is not None and tensor.shape[0] % (2 * heads):
            raise FormatError(
                f"{self.path}: {tensor.name}: {tensor.shape[0]} rows are not {heads} heads of an "
                "even size. Restore the file."
            )

    def _paired_heads(self, tensor: header.Tensor) -> int | None:
        """The number of heads if the tensor's rows are in llama.cpp's order, else None."""
        role = names.paired_role(tensor.name, self.family) if self.family else None
        if role is None or not tensor.shape:
            return None
        if role == "k" and f"{self.architecture}.attention.head_count_kv" in self.values:
            return self._heads("attention.head_count_kv")
        return self._heads("attention.head_count")

    def _heads(self, key: str) -> int:
        heads = self.values.get(f"{self.architecture}.{key}")
        if not isinstance(heads, int) or heads < 1:
            raise FormatError(
                f"{self.path}: {self.architecture}.{key} is {heads}, not a number of heads. "
                "Restore the file."
            )
        return heads

    def _check_size(self) -> None:
        size = self.path.stat().st_size
        if size < len(self._map):  # touching what was cut off would kill the process
            raise FormatError(
                f"{self.path}: shrank from {len(self._map)} to {size} bytes while it was read. "
                "Restore the file."
            )


def open(path: Path) -> File:
    """Open one file; reads and checks the header alone."""
    return File(path)


def side_files(file: File, dtype: str | None = None) -> dict[str, bytes]:
    """config.json, tokenizer.json and the like, with which transformers loads the weights.

    dtype: what the config names, such as "bfloat16"; the projections' own if None.
    """
    from lorasurgery.formats import _gguf_model

    return _gguf_model.build(file, dtype)[0]


def remarks(file: File) -> list[str]:
    """A line for each side file that cannot be made and each fact that they cannot express."""
    from lorasurgery.formats import _gguf_model

    return _gguf_model.build(file)[1]


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 4:
                raise FormatError(f"{path}: holds less than a GGUF header. It is no GGUF file.")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the file.") from None


def _refuse_parts(path: Path, values: Mapping[str, header.Scalar | header.Array]) -> None:
    count = values.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        raise FormatError(
            f"{path}: is one part of {count}. Join them with `llama-gguf-split --merge`."
        )


def _family(
    architecture: str, values: Mapping[str, header.Scalar | header.Array]
) -> names.Family | None:
    """None for adapters, mixtures of experts and architectures that are not mapped."""
    if values.get("general.type", "model") != "model" or values.get(f"{architecture}.expert_count"):
        return None
    return names.FAMILIES.get(architecture)


def _decode(data: Array, kind: str) -> Array:
    """Bytes of whole blocks as numbers, in order; the shape is the caller's."""
    import numpy as np

    from lorasurgery.arrays import NUMPY

    if kind in NUMPY:
        dtype = NUMPY[kind]
        aligned = data.ctypes.data % dtype.alignment == 0 and data.flags.c_contiguous
        return (data if aligned else data.copy()).reshape(-1).view(dtype)
    from gguf import GGMLQuantizationType, dequantize

    number = header.NUMBERS[kind]
    _, block, size = header.TYPES[number]
    flat, step = data.reshape(1, -1), CHUNK // block * size
    out = np.empty(flat.shape[1] // size * block, np.float32)
    for begin in range(0, flat.shape[1], step):
        values = dequantize(flat[:, begin : begin + step], GGMLQuantizationType(number))[0]
        at = begin // size * block
        out[at : at + values.size] = values
    return out
