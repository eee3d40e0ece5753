"""The SVD of B A from its factors alone: B = Qb Rb, Aᵀ = Qa Ra, and U S Vᵀ of the core Rb Raᵀ.

B A itself is never formed: O((in + out) k²) for factors of rank k, where the SVD of B A costs O(in out min(in, out)).
Where there are no factors, the best rank-k part is found by subspace iteration from random directions
(Halko, Martinsson, Tropp 2011, arXiv 0909.4061, Alg. 4.4 and 5.1), or by a whole SVD.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lorasurgery.arrays import Array

_OVERSAMPLE, _ITERATIONS = 8, 4


@dataclass(frozen=True, slots=True)
class Svd:
    """U float32 [..., out, k], s float64 [..., k] from large to small, Vᵀ float32 [..., k, in]."""

    u: Array
    s: Array
    vt: Array

    def factors(self, rank: int) -> tuple[Array, Array]:
        """A [..., rank, in] and B [..., out, rank] with the root of S on both sides; zeros beyond k."""
        kept = min(rank, self.s.shape[-1])
        half = np.sqrt(self.s[..., :kept]).astype(np.float32)
        a, b = half[..., None] * self.vt[..., :kept, :], self.u[..., :kept] * half[..., None, :]
        return padded(a, b, rank)


def of_product(a: Array, b: Array) -> Svd:
    """Of B A: a float32 [..., k, in], b float32 [..., out, k]."""
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.swapaxes(-1, -2))
    u, s, vt = np.linalg.svd(_core(ra, rb), full_matrices=False)
    return Svd(qb @ u.astype(np.float32), s, vt.astype(np.float32) @ qa.swapaxes(-1, -2))


def singular_values(a: Array, b: Array) -> Array:
    """Those of B A, float64 [..., k], from large to small; a third of the work of `of_product`."""
    core = _core(_triangle(a.swapaxes(-1, -2)), _triangle(b))
    values: Array = np.linalg.svd(core, compute_uv=False)
    return values


def _triangle(factor: Array) -> Array:
    # numpy's stubs say that R alone is a pair, too
    return np.asarray(np.linalg.qr(factor, mode="r"))


def _core(ra: Array, rb: Array) -> Array:
    core: Array = rb.astype(np.float64) @ ra.astype(np.float64).swapaxes(-1, -2)
    return core


def of_matrix(w: Array, rank: int, *, exact: bool = False) -> Svd:
    """The first `rank` triplets of a float32 matrix [out, in]; always the same ones.

    Unless `exact`, they are those of the subspace that a fixed seed leads to.
    """
    rank = min(rank, *w.shape)
    if exact or rank + _OVERSAMPLE >= min(w.shape):
        u, s, vt = np.linalg.svd(w, full_matrices=False)
        return Svd(u[:, :rank], s[:rank].astype(np.float64), vt[:rank])
    left = _range(w, rank + _OVERSAMPLE)
    u, s, vt = np.linalg.svd(left.T @ w, full_matrices=False)
    return Svd(left @ u[:, :rank], s[:rank].astype(np.float64), vt[:rank])


def _range(w: Array, sample: int) -> Array:
    """Orthonormal columns [out, sample] that nearly span W's first left singular vectors."""
    found = np.random.default_rng(0).standard_normal((w.shape[1], sample), dtype=np.float32)
    for _ in range(_ITERATIONS):
        left, _ = np.linalg.qr(w @ found)
        found, _ = np.linalg.qr(w.T @ left)
    left, _ = np.linalg.qr(w @ found)
    span: Array = left
    return span


def rank_for(energy: Array, share: float) -> int:
    """The smallest rank whose part of the summed squares [k] is at least `share`; 0 of nothing."""
    total = float(energy.sum())
    if total == 0:
        return 0
    reached = np.cumsum(energy) >= share * total * (1 - 1e-12)
    return int(np.argmax(reached)) + 1 if reached.any() else len(energy)


def padded(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """The same B A, with rows and columns of zeros up to `rank`; contiguous float32."""
    more = rank - a.shape[-2]
    if more > 0:
        a = np.concatenate([a, np.zeros((*a.shape[:-2], more, a.shape[-1]), a.dtype)], axis=-2)
        b = np.concatenate([b, np.zeros((*b.shape[:-1], more), b.dtype)], axis=-1)
    return np.ascontiguousarray(a, np.float32), np.ascontiguousarray(b, np.float32)
