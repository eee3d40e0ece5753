"""How much of an error E lies in the adapter's subspace: P_U E + E P_V - P_U E P_V.

U spans the columns of B and V the rows of A; ||E||² less what is outside is inside:
outside² = ||E||² - ||UᵀE||² - ||E V||² + ||UᵀE V||².
"""

from __future__ import annotations

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.targets import LowRank


class Subspace:
    """Takes E in rows, one expert after another, and holds the bases of one expert alone."""

    def __init__(self, change: LowRank) -> None:
        self._change, self._expert = change, -1
        self.energy = self.inside = 0.0

    def add(self, expert: int, row: int, error: Array) -> None:
        """E float32 [rows, columns] from `row` of this expert's matrix on."""
        if expert != self._expert:
            self._close()
            self._open(expert)
        left = self._u[row : row + len(error)].T @ error  # [k, columns]
        right = error @ self._v  # [rows, k]
        self._left += left
        self.energy += square(error)
        self.inside += square(right)

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

    def _close(self) -> None:
        if self._expert >= 0:
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
    flat = x.reshape(-1)
    return float(np.dot(flat, flat))
