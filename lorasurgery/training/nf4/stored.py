"""The linear weights of a base as NF4: as its directory has them, or packed now, byte for byte as `quantize` would."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorasurgery.arrays import Array, to_torch
from lorasurgery.codec import Codec, CodecOptions, Rule
from lorasurgery.codec import Packed as Stored
from lorasurgery.errors import MatchError
from lorasurgery.kernels._packed import SECOND, Packed
from lorasurgery.kernels.double_dequantize import TABLE
from lorasurgery.layouts import is_conv1d
from lorasurgery.model import Model, linear_weights
from lorasurgery.operations._transposed import Transposed
from lorasurgery.weights import codec_of

CODEC = "nf4"
_STATE = ".quant_state.bitsandbytes__nf4"


class PackedWeights:
    """One weight at a time; nothing is held."""

    def __init__(self, model: Model, options: CodecOptions) -> None:
        """`options` are for a base that is not packed. Raises MatchError for one without linear weights."""
        self.model, self._options = model, options
        self.ready = bool(model.weights.packed)
        self.names = frozenset(model.weights.packed or linear_weights(model, (), ()))
        if not self.names:
            raise MatchError(
                f"{model.path}: none of its {len(model.weights)} tensors is a linear weight, so that nothing "
                "can be NF4. Leave --qlora out."
            )

    def read(self, name: str) -> Packed:
        """As the kernels take it, on the CPU, in memory of its own."""
        codec = codec_of(CODEC)
        if self.ready:
            stored = self.model.weights.packed[name]
            held = hold(stored, codec, self.model.stored.read)
            self.model.stored.release(name)
            return held
        turned = {name} if is_conv1d(self.model.config, name) else set()
        source = Transposed(self.model.weights, turned)
        packed = codec.parts(source.info(name), self._options)
        parts, state = pack(source.read(name), packed, codec)
        source.release(name)
        return hold(replace(packed, state=state), codec, parts.__getitem__)


def pack(w: Array, packed: Stored, codec: Codec) -> tuple[dict[str, Array], dict[str, Any]]:
    """All tensors that would be stored of a weight, by name, and what its state says."""
    codes, absmax = codec.encode(w.reshape(-1), packed, Rule())
    sealed, _ = codec.seal(absmax, packed)
    name = packed.info.name
    parts = {packed.codes: codes, **{name + part: data for part, data in sealed.items()}}
    return parts, json.loads(bytes(sealed[_STATE]))


def hold(stored: Stored, codec: Codec, read: Callable[[str], Array]) -> Packed:
    """A stored weight in the kernels' form; scales of a second level that they do not know are decoded."""
    name, state = stored.info.name, stored.state
    codes = read(stored.codes).reshape(-1).view(np.uint8)
    table = codec.table(stored, read)
    nested = offset = None
    if _known(stored, read):
        absmax = _own(read(f"{name}.absmax"))
        nested = _own(read(f"{name}.nested_absmax"))
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    else:
        absmax = _own(codec.scales(stored, read))
    rows, block = stored.info.shape[0], int(state["blocksize"])
    return Packed(_own(codes), absmax, block, rows, _own(table), nested, offset)


def _known(stored: Stored, read: Callable[[str], Array]) -> bool:
    """Whether the scales are nested as `quantize` nests them."""
    state = stored.state
    if state.get("nested_blocksize") != SECOND or state["nested_dtype"] != "float32":
        return False
    parts = [read(f"{stored.info.name}.nested_{part}") for part in ("absmax", "quant_map")]
    return all(p.dtype == np.float32 for p in parts) and np.array_equal(parts[1], TABLE)


def _own(array: Array) -> Tensor:
    """Not the file's pages."""
    return to_torch(array.copy())
