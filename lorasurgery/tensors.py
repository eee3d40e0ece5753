"""What is known of a tensor before its data is read. Imports nothing heavy: `inspect` lives here."""

from __future__ import annotations

import math
from dataclasses import dataclass

# bits per element, by the dtype codes of safetensors
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

# the dtypes that weights are read, computed on and written in
FLOATS = ("F32", "BF16", "F16")

# what people type, and what config.json says
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, dtype (a key of BITS) and shape: all that a writer's header needs."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return (self.numel * BITS[self.dtype] + 7) // 8

    def __str__(self) -> str:
        return f"{self.name}  {self.dtype} {list(self.shape)}"
