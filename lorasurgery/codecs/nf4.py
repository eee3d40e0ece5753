"""NF4 with optional double quantization, in the tensors that bitsandbytes and transformers store.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3. For a weight X of n elements: X uint8 [ceil(n/2), 1],
X.absmax, X.quant_map, X.quant_state.bitsandbytes__nf4 (JSON as uint8), and with double quantization
X.nested_absmax, X.nested_quant_map. FP4 differs by its table alone, and is read, never written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.codec import CodecOptions, Packed, Rule
from lorasurgery.codecs._nf4_state import BLOCKS, check_parts, read_state
from lorasurgery.codecs._nf4_sums import check_finite, encode_sum, recode
from lorasurgery.errors import FormatError, ValueRangeError
from lorasurgery.tensors import DTYPE_NAMES, TensorInfo

# numpy and the kernels are imported where data is touched: `inspect` asks for `group` alone
if TYPE_CHECKING:
    from lorasurgery.arrays import Array

NESTED_BLOCK = 256
_STATE = ".quant_state.bitsandbytes__"
# the offset is known only when all scales are, but a header wants lengths before: JSON allows
# trailing blanks, and no float32 takes more digits than this when printed as a double
_STATE_ROOM = 24
_DTYPES = {code: name for name, code in DTYPE_NAMES.items()}


def group(source: Checkpoint) -> dict[str, Packed]:
    """The NF4 and FP4 weights of a checkpoint, by weight name.

    Raises FormatError where a weight lacks one of its parts or their sizes disagree.
    """
    found = {}
    for key in source:
        name, mark, kind = key.partition(_STATE)
        if mark and kind in ("nf4", "fp4"):
            found[name] = _packed(source, name, kind)
    return found


def _packed(source: Checkpoint, name: str, kind: str) -> Packed:
    key = f"{name}{_STATE}{kind}"
    try:
        state = read_state(bytes(source.read(key)))
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{source.path}: {key}: not a quantization state ({error}). Restore the file."
        ) from None
    info = TensorInfo(name, DTYPE_NAMES[state["dtype"]], tuple(state["shape"]))
    names = [*_part_names("nested_blocksize" in state), key[len(name) :]]
    missing = [name + part for part in names if name + part not in source]
    if missing:
        raise FormatError(
            f"{source.path}: {name} is {kind} {list(info.shape)}, but {missing[0]} is missing. "
            "Restore the file."
        )
    parts = {part: source.info(name + part) for part in names}
    if wrong := check_parts(info, state, parts):
        raise FormatError(f"{source.path}: {wrong}. Restore the file.")
    return Packed(info, "nf4", name, parts, {**state, "quant_type": kind})


def _part_names(double: bool) -> list[str]:
    nested = [".nested_absmax", ".nested_quant_map"] if double else []
    return ["", ".absmax", ".quant_map", *nested]


def parts(info: TensorInfo, options: CodecOptions) -> Packed:
    """How a weight will be stored; raises ValueRangeError for a block size that nobody reads."""
    if options.block not in BLOCKS:
        raise ValueRangeError(
            f"{info.name}: block size {options.block} is not one of {', '.join(map(str, BLOCKS))}. "
            "Pass one of them as --block-size."
        )
    n, blocks = info.numel, -(-info.numel // options.block)
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": options.block, "dtype": _DTYPES[info.dtype],
        "shape": list(info.shape),
    }  # fmt: skip
    layout = {
        "": ("U8", (-(-n // 2), 1)),
        ".absmax": ("U8" if options.double else "F32", (blocks,)),
        ".quant_map": ("F32", (16,)),
    }
    if options.double:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
        layout |= {
            ".nested_absmax": ("F32", (-(-blocks // NESTED_BLOCK),)),
            ".nested_quant_map": ("F32", (256,)),
        }
    layout[f"{_STATE}nf4"] = ("U8", (_state_length(state),))
    infos = {p: TensorInfo(info.name + p, *facts) for p, facts in layout.items()}
    return Packed(info, "nf4", info.name, infos, state)


def _state_length(state: Mapping[str, Any]) -> int:
    room = len(', "nested_offset": ') + _STATE_ROOM if "nested_blocksize" in state else 0
    return len(json.dumps(state)) + room


def multiple(packed: Packed) -> int:
    """Tiles start at whole blocks; the scales are nested only when all are known."""
    return int(packed.state["blocksize"])


def encode(flat: Array, packed: Packed, rule: Rule) -> tuple[Array, Array]:
    """Flat bf16, f16 or f32 [n] -> codes uint8 [ceil(n/2)], scales float32 [ceil(n/block)]."""
    from lorasurgery.kernels import nf4_quantize

    block = int(packed.state["blocksize"])
    how = block, rule.absmax, rule.seed, rule.offset
    codes, absmax = packed.device.run(nf4_quantize, flat, *how)
    check_finite(absmax, packed, rule)
    return codes, absmax


def seal(absmax: Array, packed: Packed) -> tuple[dict[str, Array], Array]:
    """All scales float32 [blocks] -> the parts beside the codes, and the scales as they decode.

    On the processor always: their mean depends on the order of its sum.
    """
    import numpy as np

    from lorasurgery.kernels import double_dequantize, double_quantize, nf4_dequantize

    state = dict(packed.state)
    sealed: dict[str, Array] = {".absmax": absmax, ".quant_map": nf4_dequantize.NF4}
    decoded = absmax
    if "nested_blocksize" in state:
        q, nested, offset = double_quantize.run(absmax)
        state["nested_offset"] = float(offset)
        sealed |= {
            ".absmax": q, ".nested_absmax": nested, ".nested_quant_map": double_dequantize.TABLE,
        }  # fmt: skip
        decoded = double_dequantize.run(q, nested, offset)
    text = json.dumps(state).encode()
    key = f"{_STATE}nf4"
    sealed[key] = np.frombuffer(text.ljust(packed.parts[key].numel), np.uint8)
    return sealed, decoded


def scales(packed: Packed, read: Callable[[str], Array]) -> Array:
    """The float32 scales of a stored weight, un-nested."""
    import numpy as np

    from lorasurgery.arrays import NUMPY
    from lorasurgery.kernels import double_dequantize

    name, state = packed.info.name, packed.state
    absmax = read(f"{name}.absmax")
    if "nested_blocksize" not in state:
        return absmax.astype(np.float32)  # a copy: mapped pages are given back, and read-only
    nested, table = read(f"{name}.nested_absmax"), read(f"{name}.nested_quant_map")
    block, offset = int(state["nested_blocksize"]), np.float32(state["nested_offset"])
    if state["nested_dtype"] == "float32":
        return double_dequantize.run(absmax, nested, offset, block, table)
    # live modules that were repacked for AVX512-BF16 save states like this: they round twice
    kind = NUMPY[DTYPE_NAMES[state["nested_dtype"]]]
    coarse = double_dequantize.run(absmax, nested, np.float32(0), block, table).astype(kind)
    return (coarse.astype(np.float32) + offset).astype(kind).astype(np.float32)


def table(packed: Packed, read: Callable[[str], Array]) -> Array:
    """The 16 values that the codes stand for, as the file has them."""
    import numpy as np

    return read(f"{packed.info.name}.quant_map").astype(np.float32, copy=False)


def decode(codes: Array, absmax: Array, table: Array, n: int, packed: Packed) -> Array:
    """A tile of codes uint8 [ceil(n/2)] -> n flat weights in the dtype the weight had."""
    import numpy as np

    from lorasurgery.arrays import NUMPY
    from lorasurgery.kernels import nf4_dequantize

    block, dtype = int(packed.state["blocksize"]), NUMPY[packed.info.dtype]
    flat = codes.reshape(-1).view(np.uint8)
    decoded: Array = packed.device.run(nf4_dequantize, flat, absmax, block, n, dtype, table)
    return decoded


def config(options: CodecOptions, dtype: str, skipped: list[str]) -> dict[str, Any]:
    """The quantization_config of config.json, as transformers writes it; `skipped` are modules."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_compute_dtype": _DTYPES[dtype],
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": options.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skipped,
        "llm_int8_threshold": 6.0,
    }


def as_dtype(packed: Packed, dtype: str) -> Packed:
    """The same stored weight, to be decoded to another dtype."""
    return replace(packed, info=replace(packed.info, dtype=dtype))


__all__ = [
    "as_dtype", "config", "decode", "encode", "encode_sum", "group", "multiple", "parts", "recode",
    "scales", "seal", "table",
]  # fmt: skip
