"""A tensor before and after, walked through in tiles beside the factors of its intended change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import ByRows, Change, Dense, LowRank
from lorasurgery.codec import Packed, Rule
from lorasurgery.kernels import lora_delta
from lorasurgery.weights import Weights, codec_of

# a dozen float32 arrays of this size are made and dropped for each tile: from 128 KiB on, malloc
# would map and unmap every one of them, which took five times as long as the arithmetic
_ELEMENTS = 16 << 10
# pages of the files that were read need not stay
_RELEASE = 32 << 20


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of one matrix: of the only one, or of one expert's."""

    expert: int
    row: int  # of the matrix
    at: int  # index of the first element in the flat tensor
    w: Array  # float32 [rows, columns], the base's
    merged: Array  # [rows, columns], as the merged model has them
    a: Array  # float32 [k, columns]
    b: Array  # float32 [rows, k]
    given: Array | None = (
        None  # the intended change float32 [rows, columns], where no factors make it
    )

    def delta(self) -> Array:
        """What was to be added: float32 [rows, columns]."""
        return lora_delta.run(self.a, self.b) if self.given is None else self.given


@dataclass(frozen=True, slots=True)
class Pair:
    """Tensor `old` of the base and `new` of the merged model, of one shape."""

    base: Weights
    old: str
    merged: Weights
    new: str
    scale: float = 1.0  # that the intended change B A has been multiplied by, at most

    @property
    def packed(self) -> Packed | None:
        """How the merged tensor is quantized, if it is."""
        return self.merged.packed.get(self.new)

    def tiles(self, change: Change) -> Iterator[Tile]:
        """Rows in order; whole blocks of a quantized weight where its rows allow."""
        columns = change.columns
        block = codec_of(self.packed.codec).multiple(self.packed) if self.packed else 1
        unit = block // gcd(columns, block)
        step = max(unit, _ELEMENTS // max(1, columns) // unit * unit)
        factors, given = (change, None) if isinstance(change, LowRank) else (_none(change), change)
        rows, read = factors.b.shape[1], 0
        for n in range(len(factors.a)):
            for row in range(0, rows, step):
                b = factors.b[n, row : row + step]
                w, merged = (
                    _rows(source, name, n if len(factors.a) > 1 else None, (row, row + len(b)))
                    for source, name in ((self.base, self.old), (self.merged, self.new))
                )
                yield Tile(
                    n, row, (n * rows + row) * columns, w.astype(np.float32, copy=False), merged,
                    factors.a[n], b, given.part(n, row, row + len(b)) if given else None,
                )  # fmt: skip
                read += merged.nbytes
                if read > _RELEASE and not self.packed and self.old not in self.base.packed:
                    read = 0
                    self.release()

    def release(self) -> None:
        self.base.release(self.old)
        self.merged.release(self.new)


def _none(change: Dense | ByRows) -> LowRank:
    n, rows, columns = change.shape
    return LowRank(np.zeros((n, 0, columns), np.float32), np.zeros((n, rows, 0), np.float32))


def _rows(source: Weights, name: str, expert: int | None, rows: tuple[int, int]) -> Array:
    if expert is None:
        part = source.read(name, *rows)
    else:
        part = source.read(name, expert, expert + 1)[0, slice(*rows)]
    return part.reshape(rows[1] - rows[0], -1)


class Grid:
    """The codes of a quantized weight, and how far apart the values are that they stand for."""

    def __init__(self, source: Weights, packed: Packed) -> None:
        self._packed, self._codec = packed, codec_of(packed.codec)
        self._block = self._codec.multiple(packed)
        self._codes = source.stored.read(packed.codes).reshape(-1).view(np.uint8)
        self._absmax = source.scales(packed.info.name)
        table = self._codec.table(packed, source.stored.read)
        self._gap = _gaps(table)

    def codes(self, at: int, n: int) -> Array:
        """The codes uint8 [n] of the elements from `at` on, an even index."""
        return _unpack(self._codes[at // 2 : (at + n + 1) // 2])[:n]

    def nearest(self, flat: Array, at: int) -> Array:
        """The codes uint8 [n] that are nearest to float32 values, on the scales that are there."""
        scales = self._absmax[at // self._block : -(-(at + flat.size) // self._block)]
        codes, _ = self._codec.encode(flat, self._packed, Rule(absmax=scales, offset=at))
        return _unpack(codes)[: flat.size]

    def aligned(self, at: int) -> bool:
        """Whether a block begins here."""
        return at % self._block == 0

    def gap2(self, codes: Array, at: int) -> float:
        """The sum of the squared distances to the next codes, in units of the weight."""
        index = np.arange(at, at + codes.size) // self._block
        step = self._gap[codes] * self._absmax[index]
        return float(np.dot(step, step))


def _unpack(codes: Array) -> Array:
    return np.stack((codes >> 4, codes & 15), axis=-1).reshape(-1)


def _gaps(table: Array) -> Array:
    """For each code the larger distance to its neighbours, as a share of absmax: float32 [16]."""
    order = np.argsort(table, kind="stable")
    steps = np.diff(table[order])
    gaps = np.empty(16, np.float32)
    gaps[order] = np.maximum(np.append(steps, 0), np.insert(steps, 0, 0))
    return gaps
