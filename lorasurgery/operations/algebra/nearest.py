"""The nearest product of small factors to a matrix that is at hand, and what it does not hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ValueRangeError
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.operations.algebra.svd import Svd, of_matrix, padded, rank_for
from lorasurgery.report import Result

_FIRST, _TIMES = 16, 4  # ranks that are tried, until one holds the energy
_ROWS = 1 << 20  # elements of what is formed of B A at a time


@dataclass(frozen=True, slots=True)
class Aim:
    """How much is wanted of each module's change: a rank at most, a share of its energy at least."""

    rank: int | None = None
    energy: float | None = None
    exact: bool = False  # a whole SVD, where random directions would do

    def check(self) -> None:
        """Raises ValueRangeError."""
        check_rank(self.rank)
        check_energy(self.energy)

    @property
    def settings(self) -> dict[str, object]:
        return {"rank": self.rank, "energy": self.energy, "exact": self.exact}


def check_rank(rank: int | None, flag: str = "--rank") -> None:
    """Raises ValueRangeError for a rank that is none."""
    if rank is not None and rank < 1:
        raise ValueRangeError(f"{flag} {rank}: is no rank. Pass 1 or more.")


def check_energy(energy: float | None) -> None:
    """Raises ValueRangeError for what is no share."""
    if energy is not None and not 0 < energy <= 1:
        raise ValueRangeError(f"--energy {energy:g}: is no share. Pass more than 0 and at most 1.")


def nearest(delta: Array, aim: Aim) -> tuple[Array, Array, float, float]:
    """A and B, ||delta - B A||² and ||delta||² for a float32 [out, in], or [experts, out, in] of one rank."""
    stack = delta if delta.ndim == 3 else delta[None]
    pairs = [_factors(one, aim) for one in stack]
    rank = max(len(a) for a, _ in pairs)
    full = [padded(a, b, rank) for a, b in pairs]
    error2 = sum(residual2(one, a, b) for one, (a, b) in zip(stack, full, strict=True))
    a, b = np.stack([a for a, _ in full]), np.stack([b for _, b in full])
    return (a, b, error2, square(delta)) if delta.ndim == 3 else (a[0], b[0], error2, square(delta))


def _factors(delta: Array, aim: Aim) -> tuple[Array, Array]:
    found, rank = first(delta, aim)
    return found.factors(rank)


def first(delta: Array, aim: Aim) -> tuple[Svd, int]:
    """The first triplets of a float32 [out, in], and how many of them are aimed at: 1 at least."""
    most = min(aim.rank or min(delta.shape), *delta.shape)
    if aim.energy is None:
        return of_matrix(delta, most, exact=aim.exact), most
    found, rank = _with_energy(delta, most, aim.energy, exact=aim.exact)
    return found, max(1, rank)


def _with_energy(delta: Array, most: int, energy: float, *, exact: bool) -> tuple[Svd, int]:
    """The first triplets that hold this share of the whole, or the first `most`."""
    wanted, tried = energy * square(delta) * (1 - 1e-6), most if exact else min(_FIRST, most)
    while True:
        found = of_matrix(delta, tried, exact=exact)
        squares = np.square(found.s)
        held = float(squares.sum())
        if held >= wanted:
            return found, rank_for(squares, min(1.0, wanted / held))
        if tried == most:
            return found, most
        tried = min(tried * _TIMES, most)


def residual2(delta: Array, a: Array, b: Array) -> float:
    """||delta - B A||², a few rows at a time."""
    step = max(1, _ROWS // delta.shape[1])
    return sum(
        square(delta[i : i + step] - b[i : i + step] @ a) for i in range(0, len(delta), step)
    )


def loss(error2: float, norm2: float) -> dict[str, float]:
    """What a module's change, of which norm2 is the square, has lost."""
    lost = error2 / norm2 if norm2 else 0.0
    return {
        "energy": max(0.0, 1 - lost), "relative_error": math.sqrt(lost),
        "error2": error2, "norm2": norm2,
    }  # fmt: skip


def total(results: Sequence[Result]) -> dict[str, float]:
    """The loss over all modules."""
    error2 = sum(r.metrics.get("error2", 0.0) for r in results)
    norm2 = sum(r.metrics.get("norm2", 0.0) for r in results)
    return {k: v for k, v in loss(error2, norm2).items() if k not in ("error2", "norm2")}
