"""What is to be added to a weight: as the product of small factors, or element by element.

A change is walked through in rows of the tensor's first dimension; a piece of it knows how it is
added, with what rounding kept of it, and how it is taken out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.device import HOST, Device
from lorasurgery.kernels import lora_delta, lora_merge
from lorasurgery.tensors import TensorInfo

# W' [rows, columns], <W' - W, D>, ||D||², ||W' - W - D||²
Merged: TypeAlias = tuple[Array, float, float, float]
# rows start:stop of a weight, or of what is made of them
Rows: TypeAlias = Callable[[int, int], Array]
# what Piece.merge does, of rows from the given one on: (W, first row, dtype, (seed, offset), device)
Fused: TypeAlias = Callable[[Array, int, Any, tuple[int | None, int], Device], Merged]

# from 128 KiB on, malloc would map and unmap each of the arrays that a few rows are made into
_ELEMENTS = 16 << 10


class Piece(Protocol):
    """Some rows of a change, for W [rows, columns] of any float dtype."""

    def rows(self) -> Array:
        """The change itself, float32."""
        ...

    def merge(
        self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0, device: Device = HOST
    ) -> Merged: ...

    def before(self, merged: Array, dtype: Any) -> Array:
        """What W was, as well as W' tells; the same bits on every machine."""
        ...


@dataclass(frozen=True, slots=True)
class Factors:
    """B A: a float32 [k, columns], b [rows, k]."""

    a: Array
    b: Array

    def rows(self) -> Array:
        return lora_delta.run(self.a, self.b)

    def merge(
        self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0, device: Device = HOST
    ) -> Merged:
        merged: Merged = device.run(lora_merge, w, self.a, self.b, dtype, seed, offset)
        return merged

    def before(self, merged: Array, dtype: Any) -> Array:
        was: Array = lora_merge.run(merged, self.a, -self.b, dtype)[0]
        return was


@dataclass(frozen=True, slots=True)
class Given:
    """Numbers that no small factors make: d float32 [rows, columns]."""

    d: Array

    def rows(self) -> Array:
        return self.d

    def merge(
        self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0, device: Device = HOST
    ) -> Merged:
        wide = w.astype(np.float32, copy=False)
        merged: Array = _none(wide).merge(wide + self.d, dtype, seed, offset, device)[0]
        made = merged.astype(np.float32) - wide
        noise = made - self.d
        return merged, _dot(made, self.d), _dot(self.d, self.d), _dot(noise, noise)

    def before(self, merged: Array, dtype: Any) -> Array:
        """What was added came of products that differ between machines, or of W: nothing is assumed."""
        return _none(merged).before(merged, dtype)


@dataclass(frozen=True, slots=True)
class Made:
    """Rows start:stop of a change, each made when it is needed: `make` gives float32 [rows, columns]."""

    make: Rows
    start: int
    stop: int
    columns: int
    fused: Fused | None = None

    def rows(self) -> Array:
        made = np.empty((self.stop - self.start, self.columns), np.float32)
        for part in self._parts():
            made[part] = self._given(part).d
        return made

    def merge(
        self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0, device: Device = HOST
    ) -> Merged:
        if self.fused:
            return self.fused(w, self.start, dtype, (seed, offset), device)
        merged = np.empty(w.shape, dtype)
        sums = np.zeros(3)
        for part in self._parts():
            first = offset + part.start * self.columns
            merged[part], *numbers = self._given(part).merge(w[part], dtype, seed, first)
            sums += numbers
        signal, power, noise2 = (float(number) for number in sums)
        return merged, signal, power, noise2

    def before(self, merged: Array, dtype: Any) -> Array:
        """As Given's."""
        return _none(merged).before(merged, dtype)

    def _given(self, part: slice) -> Given:
        return Given(self.make(self.start + part.start, self.start + part.stop))

    def _parts(self) -> Iterator[slice]:
        step, n = max(1, _ELEMENTS // max(1, self.columns)), self.stop - self.start
        return (slice(i, min(i + step, n)) for i in range(0, n, step))


def _none(w: Array) -> Factors:
    return Factors(np.zeros((0, w.shape[1]), np.float32), np.zeros((len(w), 0), np.float32))


def _dot(x: Array, y: Array) -> float:
    return float(np.dot(x.reshape(-1), y.reshape(-1)))


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change of a tensor seen as [n, rows, columns]: a float32 [n, k, columns], b [n, rows, k]."""

    a: Array
    b: Array

    def tiles(self, start: int, stop: int) -> Iterator[tuple[slice, Piece]]:
        """For rows start:stop of the tensor's first dimension: which of them, and what is added."""
        if len(self.a) == 1:
            yield slice(None), Factors(self.a[0], self.b[0, start:stop])
            return
        for n in range(start, min(stop, len(self.a))):
            yield slice(n - start, n - start + 1), Factors(self.a[n], self.b[n])

    @property
    def columns(self) -> int:
        return int(self.a.shape[2])

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.a), int(self.b.shape[1]), self.columns

    @property
    def rank(self) -> int:
        return int(self.a.shape[1])

    @classmethod
    def nothing(cls, info: TensorInfo) -> LowRank:
        """Rank 0: W + B A is W."""
        rows = info.shape[0] if info.shape else 1
        columns = info.numel // max(1, rows)
        return cls(np.zeros((1, 0, columns), np.float32), np.zeros((1, rows, 0), np.float32))


@dataclass(frozen=True, slots=True)
class Dense:
    """The change of a tensor seen as [n, rows, columns], all of it: d float32."""

    d: Array

    @property
    def columns(self) -> int:
        return int(self.d.shape[2])

    @property
    def rank(self) -> int:
        """The most it can be."""
        return int(min(self.d.shape[1:]))

    @property
    def shape(self) -> tuple[int, int, int]:
        n, rows, columns = self.d.shape
        return n, rows, columns

    def part(self, n: int, start: int, stop: int) -> Array:
        """Rows start:stop of one matrix."""
        return self.d[n, start:stop]

    def tiles(self, start: int, stop: int) -> Iterator[tuple[slice, Piece]]:
        """As LowRank's."""
        if len(self.d) == 1:
            yield slice(None), Given(self.d[0, start:stop])
            return
        for n in range(start, min(stop, len(self.d))):
            yield slice(n - start, n - start + 1), Given(self.d[n])


@dataclass(frozen=True, slots=True)
class ByRows:
    """The change of a tensor [rows, columns], each row of which is made of the weight's own row."""

    make: Rows
    rows: int
    columns: int
    fused: Fused | None = None  # the same and the sum with W, where W is what it is made of

    @property
    def rank(self) -> int:
        """The most it can be."""
        return min(self.rows, self.columns)

    @property
    def shape(self) -> tuple[int, int, int]:
        return 1, self.rows, self.columns

    def part(self, n: int, start: int, stop: int) -> Array:  # noqa: ARG002 - there is one matrix
        """Rows start:stop."""
        return self.make(start, min(stop, self.rows))

    def tiles(self, start: int, stop: int) -> Iterator[tuple[slice, Piece]]:
        """As LowRank's."""
        yield slice(None), Made(self.make, start, min(stop, self.rows), self.columns, self.fused)


Change: TypeAlias = LowRank | Dense | ByRows


def widened(w: Array) -> Array:
    """A weight as float32 [n, rows, columns]: a stack of experts, or n = 1."""
    wide = w.astype(np.float32)
    return wide if wide.ndim == 3 else wide.reshape(1, len(wide) if wide.ndim else 1, -1)
