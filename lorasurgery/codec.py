"""A codec packs one logical weight into several tensors: codes that can be tiled, and scales.

Merging into a quantized base is encode(decode(parts) + delta): adapters never learn of codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.device import HOST, Device
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

    # a change B A: a float32 [r, columns], b [rows, r]
    Low: TypeAlias = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class Packed:
    """One logical weight of a quantized checkpoint.

    `info` is the weight as it was (dtype, shape); `codes` names the tensor of packed codes;
    `parts` are all tensors it is stored in; `state` is the codec's own (block size, nesting, ...);
    `device` is where it is encoded and decoded.
    """

    info: TensorInfo
    codec: str
    codes: str
    parts: Mapping[str, TensorInfo]
    state: Mapping[str, Any]
    device: Device = HOST


@dataclass(frozen=True, slots=True)
class CodecOptions:
    """How to pack: weights per scale, and whether the scales are quantized once more."""

    block: int = 64
    double: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


class Codec(Protocol):
    """What a module in codecs/ offers. Weights are flat; a tile starts at a multiple of `tile`."""

    def group(self, source: Checkpoint) -> dict[str, Packed]:
        """The logical weights that this codec finds in a checkpoint, by weight name."""
        ...

    def parts(self, info: TensorInfo, options: CodecOptions) -> Packed:
        """How a weight will be stored: facts alone, before any data."""
        ...

    def multiple(self, packed: Packed) -> int:
        """A tile of the flat weight starts at a multiple of this many elements."""
        ...

    def encode(self, flat: Array, packed: Packed, rule: Rule) -> tuple[Array, Array]:
        """A tile -> its packed codes and its float32 scales. `rule` says how to round."""
        ...

    def encode_sum(
        self, w: Array, base: Array, change: Low | Array, packed: Packed, rule: Rule
    ) -> Coded:
        """Rows of W + D, D flat or as factors, encoded; D was meant for `base`."""
        ...

    def recode(self, stored: Stored, change: Low, packed: Packed, rule: Rule) -> Coded:
        """The same where W is stored in this codec, and D is for what it decodes to."""
        ...

    def seal(self, absmax: Array, packed: Packed) -> tuple[dict[str, Array], Array]:
        """All scales of a weight -> every part but the codes, and the scales as they decode."""
        ...

    def scales(self, packed: Packed, read: Callable[[str], Array]) -> Array:
        """The float32 scales of a stored weight; `read` fetches a tensor by its full name."""
        ...

    def table(self, packed: Packed, read: Callable[[str], Array]) -> Array:
        """The values that the codes of a stored weight stand for, float32."""
        ...

    def decode(self, codes: Array, absmax: Array, table: Array, n: int, packed: Packed) -> Array:
        """A tile of codes with its scales -> n flat weights in packed.info.dtype."""
        ...

    def as_dtype(self, packed: Packed, dtype: str) -> Packed:
        """The same stored weight, to be decoded to another dtype."""
        ...

    def config(self, options: CodecOptions, dtype: str, skipped: list[str]) -> dict[str, Any]:
        """What config.json says of a checkpoint in this codec; `skipped` are module names."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Whole blocks of a stored weight."""

    codes: Array  # uint8
    absmax: Array  # float32, as they decode
    table: Array  # what the codes stand for


@dataclass(frozen=True, slots=True)
class Coded:
    """Whole blocks of a weight that is being encoded: its scales are not sealed yet."""

    codes: Array  # uint8
    absmax: Array  # float32
    moments: Array  # float64 [blocks, 6], what they hold of a change: `kernels/nf4_moments.py`


@dataclass(frozen=True, slots=True)
class Rule:
    """How a value becomes a code: to the nearest, or up or down by chance; on which scales."""

    absmax: Array | None = None  # float32 scales to keep; None: fresh from the values
    table: Array | None = None  # what codes on those scales stand for; None: the codec's own
    seed: int | None = None  # None: to the nearest code
    offset: int = 0  # index of the tile's first element, so that chance is free of tiling
