"""What bitsandbytes says of a packed weight (JSON beside it), held to what it may say.

Kernels index by these numbers without looking: what lies here would read beyond an array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lorasurgery.tensors import DTYPE_NAMES, FLOATS, TensorInfo

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def read_state(text: bytes) -> dict[str, Any]:
    """The state of one weight; raises ValueError with the reason why it can be none."""
    try:
        state = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None
    if not isinstance(state, dict):
        raise ValueError(f"it is a {type(state).__name__}")  # noqa: TRY004 - the file's fault, not the caller's
    shape = state.get("shape")
    if not isinstance(shape, list) or not shape or not all(_is_count(n) for n in shape):
        raise ValueError(f"shape {shape}")
    if state.get("blocksize") not in BLOCKS:
        raise ValueError(f"blocksize {state.get('blocksize')}")
    _check_dtype(state, "dtype")
    if "nested_blocksize" in state:
        if not _is_count(state["nested_blocksize"]):
            raise ValueError(f"nested_blocksize {state['nested_blocksize']}")
        _check_dtype(state, "nested_dtype")
        offset = state.get("nested_offset")
        if not isinstance(offset, (int, float)) or not math.isfinite(offset):
            raise ValueError(f"nested_offset {offset}")
    return state


def _is_count(n: object) -> bool:
    return type(n) is int and 0 < n < 2**48


def _check_dtype(state: Mapping[str, Any], key: str) -> None:
    value = state.get(key)
    if not isinstance(value, str) or DTYPE_NAMES.get(value) not in FLOATS:
        raise ValueError(f"{key} {value!r}")


def check_parts(
    info: TensorInfo, state: Mapping[str, Any], parts: Mapping[str, TensorInfo]
) -> str | None:
    """What is wrong with the sizes and dtypes of the stored parts, if anything is."""
    blocks = -(-info.numel // int(state["blocksize"]))
    double = "nested_blocksize" in state
    want = {
        ".absmax": (blocks, ("U8",) if double else FLOATS),
        ".quant_map": (16, FLOATS),
    }
    if double:
        nested = -(-blocks // int(state["nested_blocksize"]))
        want |= {".nested_absmax": (nested, FLOATS), ".nested_quant_map": (256, FLOATS)}
    # codes may be stored as words of any dtype over the same bytes (FSDP)
    if parts[""].nbytes != -(-info.numel // 2):
        return _wrong(parts[""].name, parts[""].nbytes, info, state, -(-info.numel // 2))
    for part, (numel, dtypes) in want.items():
        found = parts[part]
        if found.numel != numel:
            return _wrong(found.name, found.numel, info, state, numel)
        if found.dtype not in dtypes:
            return f"{found.name}: {found.dtype}, but {' or '.join(dtypes)} is due"
    return None


def _wrong(name: str, got: int, info: TensorInfo, state: Mapping[str, Any], numel: int) -> str:
    return f"{name}: {got} entries, but {list(info.shape)} in blocks of {state['blocksize']} takes {numel}"
