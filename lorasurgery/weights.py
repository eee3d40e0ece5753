"""A checkpoint's logical weights: packed ones look like the 16-bit tensors that they stand for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lorasurgery import plugins
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.codec import Codec, Packed
from lorasurgery.device import HOST, Device
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def packed_weights(source: Checkpoint) -> dict[str, Packed]:
    """All weights that some codec recognises by the names in the file."""
    found: dict[str, Packed] = {}
    for name in plugins.names("codecs"):
        found |= codec_of(name).group(source)
    return found


def codec_of(name: str) -> Codec:
    """The codec by its name."""
    return cast(Codec, plugins.load("codecs", name))


# weights after which the mapped pages of their codes are given back, the scales being kept
_WINDOW = 1 << 25


@dataclass(frozen=True, slots=True)
class _Scales:
    absmax: Array
    table: Array


class Weights:
    """A Checkpoint of logical weights over a stored one; `packed` says which are decoded.

    `turned` are packed [out, in] where the model has them as [in, out] (Conv1D): they are read as
    the model has them.
    """

    def __init__(
        self,
        stored: Checkpoint,
        dtype: str | None = None,
        turned: Callable[[str], bool] = lambda _: False,
        device: Device = HOST,
    ) -> None:
        """Packed weights are decoded to `dtype`, or to the one they had; on `device`."""
        self.stored, self.path = stored, stored.path
        self.metadata: Mapping[str, str] = stored.metadata
        found = packed_weights(stored)
        self.packed = {k: replace(packed, device=device) for k, packed in found.items()}
        if dtype:
            self.packed = {k: codec_of(p.codec).as_dtype(p, dtype) for k, p in self.packed.items()}
        self.turned = frozenset(name for name in self.packed if turned(name))
        owned = {part.name for p in self.packed.values() for part in p.parts.values()}
        self._names = [n for n in stored if n in self.packed or n not in owned]
        self._known, self._lock = set(self._names), threading.Lock()
        self._scales: dict[str, _Scales] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def info(self, name: str) -> TensorInfo:
        info = self.packed[name].info if name in self.packed else self.stored.info(name)
        return replace(info, shape=info.shape[::-1]) if name in self.turned else info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        """Rows start:stop; packed ones are decoded from the first block they touch."""
        if name not in self.packed:
            return self.stored.read(name, start, stop)
        if name in self.turned:
            return self._decoded(name, 0, None).T[start:stop].copy()
        return self._decoded(name, start, stop)

    def _decoded(self, name: str, start: int, stop: int | None) -> Array:
        packed, codec = self.packed[name], codec_of(self.packed[name].codec)
        rows, row = packed.info.shape[0], packed.info.numel // max(1, packed.info.shape[0])
        stop = rows if stop is None else min(stop, rows)
        begin, end, block = start * row, stop * row, codec.multiple(packed)
        first = begin // block * block
        codes = self._codes(packed)[first // 2 : -(-end // 2)]
        scales = self._scales_of(name)
        absmax = scales.absmax[first // block : -(-end // block)]
        flat = codec.decode(codes, absmax, scales.table, end - first, packed)
        if first // _WINDOW != end // _WINDOW:
            self.stored.release(packed.codes)
        return flat[begin - first :].reshape(stop - start, *packed.info.shape[1:])

    def release(self, name: str) -> None:
        with self._lock:
            self._scales.pop(name, None)
        self.stored.release(name)

    def place(self, name: str) -> tuple[Path, int] | None:
        return None if name in self.packed else self.stored.place(name)

    def storage(self, name: str) -> tuple[str, int]:
        if name not in self.packed:
            return self.stored.storage(name)
        parts = self.packed[name].parts.values()
        return str(self.packed[name].state["quant_type"]).upper(), sum(p.nbytes for p in parts)

    def scales(self, name: str) -> Array:
        """The float32 scales of a packed weight, as they decode."""
        return self._scales_of(name).absmax

    def _codes(self, packed: Packed) -> Array:
        import numpy as np

        return self.stored.read(packed.codes).reshape(-1).view(np.uint8)

    def _scales_of(self, name: str) -> _Scales:
        with self._lock:
            if name not in self._scales:
                packed, codec = self.packed[name], codec_of(self.packed[name].codec)
                read = self.stored.read
                self._scales[name] = _Scales(codec.scales(packed, read), codec.table(packed, read))
            return self._scales[name]


class Single:
    """A checkpoint of one tensor that is in memory: what an adapter brings along whole."""

    def __init__(self, path: Path, info: TensorInfo, data: Array) -> None:
        self.path, self._info, self._data = path, info, data
        self.metadata: Mapping[str, str] = {}

    def __iter__(self) -> Iterator[str]:
        return iter((self._info.name,))

    def __len__(self) -> int:
        return 1

    def __contains__(self, name: object) -> bool:
        return name == self._info.name

    def info(self, name: str) -> TensorInfo:
        assert name in self, name
        return self._info

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        assert name in self, name
        return self._data[start:stop] if self._info.shape else self._data

    def release(self, name: str) -> None:
        """It is the caller's."""

    def place(self, name: str) -> tuple[Path, int] | None:
        assert name in self, name
        return None

    def storage(self, name: str) -> tuple[str, int]:
        assert name in self, name
        return self._info.dtype, self._info.nbytes
