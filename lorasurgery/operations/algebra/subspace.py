"""How much of an error E lies in the adapter's subspace: P_U E + E P_V - P_U E P_V.

U spans the columns of B and V the rows of A; ||E||² less what is outside is inside:
outside² = ||E||² - ||UᵀE||² - ||E V||² + ||UᵀE V||².
"""

from __future__ import annotations

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import LowRank

# of a batch of rows: products of fewer would be slow
_ELEMENTS = 256 << 10


class Subspace:
    """Takes E in rows, one expert after another, and holds the bases of one expert alone."""

    def __init__(self, change: LowRank) -> None:
        self._change, self._expert = change, -1
        columns = change.a.shape[2]
        # rows are gathered for larger products
        self._rows = np.empty((max(1, _ELEMENTS // columns), columns), np.float32)
        self._first = self._filled = 0
        self.energy = self.inside = 0.0

    def add(self, expert: int, row: int, error: Array) -> None:
        """E float32 [rows, columns] from `row` of this expert's matrix on; rows come in order."""
        if expert != self._expert:
            self._close()
            self._open(expert)
        done = 0
        while done < len(error):
            if self._filled == len(self._rows):
                self._flush()
            if not self._filled:
                self._first = row + done
            part = error[done : done + len(self._rows) - self._filled]
            self._rows[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)

    def finish(self) -> tuple[float, float]:
        """Inside² and outside² of all that was added."""
        self._close()
        inside = min(self.inside, self.energy)
        return inside, self.energy - inside

    def _open(self, expert: int) -> None:
        self._expert = expert
        self._u = basis(self._change.b[expert])
        self._v = basis(self._change.a[expert].T)
        # rows come by the ten thousand: float32 sums would lose what is small
        self._left = np.zeros((self._u.shape[1], self._v.shape[0]))

    def _flush(self) -> None:
        error = self._rows[: self._filled]
        self._left += self._u[self._first : self._first + self._filled].T @ error  # [k, columns]
        self.energy += square(error)
        self.inside += square(error @ self._v)  # [rows, k]
        self._filled = 0

    def _close(self) -> None:
        if self._expert >= 0:
            self._flush()
            self.inside += square(self._left) - square(self._left @ self._v)
        self._expert = -1


def basis(factor: Array) -> Array:
    """An orthonormal basis float32 [n, rank] of the columns of a factor [n, k]."""
    q, r = np.linalg.qr(factor)
    left, values, _ = np.linalg.svd(r.astype(np.float64))
    # what float32 factors of this length can tell from zero
    floor = values[:1] * np.finfo(np.float32).eps * max(factor.shape) ** 0.5
    kept = left[:, : values.size][:, values > floor]
    basis: Array = q @ kept.astype(np.float32)
    return basis


def square(x: Array) -> float:
    """The sum of squares."""
    return product(x, x)


def product(x: Array, y: Array) -> float:
    """The sum of x y, in float64; BLAS would sum in float32, and with threads of its own."""
    return float(np.multiply(x, y).sum(dtype=np.float64))
