"""What is to be added to a weight: as the product of small factors, or element by element.

A change is walked through in rows of the tensor's first dimension; a piece of it knows how it is
added, with what rounding kept of it, and how it is taken out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.kernels import lora_delta, lora_merge
from lorasurgery.tensors import TensorInfo

# W' [rows, columns], <W' - W, D>, ||D||², ||W' - W - D||²
Merged: TypeAlias = tuple[Array, float, float, float]


class Piece(Protocol):
    """Some rows of a change, for W [rows, columns] of any float dtype."""

    def rows(self) -> Array:
        """The change itself, float32."""
        ...

    def merge(self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0) -> Merged: ...

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

    def merge(self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0) -> Merged:
        return lora_merge.run(w, self.a, self.b, dtype, seed, offset)

    def before(self, merged: Array, dtype: Any) -> Array:
        was: Array = lora_merge.run(merged, self.a, -self.b, dtype)[0]
        return was


@dataclass(frozen=True, slots=True)
class Given:
    """Numbers that no small factors make: d float32 [rows, columns]."""

    d: Array

    def rows(self) -> Array:
        return self.d

    def merge(self, w: Array, dtype: Any, seed: int | None = None, offset: int = 0) -> Merged:
        wide = w.astype(np.float32, copy=False)
        merged: Array = _none(wide).merge(wide + self.d, dtype, seed, offset)[0]
        made = merged.astype(np.float32) - wide
        noise = made - self.d
        return merged, _dot(made, self.d), _dot(self.d, self.d), _dot(noise, noise)

    def before(self, merged: Array, dtype: Any) -> Array:
        """What was added came of products that differ between machines, or of W: nothing is assumed."""
        return _none(merged).before(merged, dtype)


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

    def tiles(self, start: int, stop: int) -> Iterator[tuple[slice, Piece]]:
        """As LowRank's."""
        if len(self.d) == 1:
            yield slice(None), Given(self.d[0, start:stop])
            return
        for n in range(start, min(stop, len(self.d))):
            yield slice(n - start, n - start + 1), Given(self.d[n])


Change: TypeAlias = LowRank | Dense


def widened(w: Array) -> Array:
    """A weight as float32 [n, rows, columns]: a stack of experts, or n = 1."""
    wide = w.astype(np.float32)
    return wide if wide.ndim == 3 else wide.reshape(1, len(wide) if wide.ndim else 1, -1)
