"""The best rank-k part of a change by what it does to outputs: min E||(D - D') x||² = ||(D - D') L||², L Lᵀ = E[x xᵀ].

With U the first left singular vectors of D L it is D' = U Uᵀ D, for (D L)ₖ = U Uᵀ D L: nothing is divided by L, which may
be singular. Of factors, D L is never formed: with B = Qb Rb the U are Qb times the eigenvectors of
Rb E[u uᵀ] Rbᵀ, u = A x, and their eigenvalues the squares of the singular values of D L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.algebra.nearest import Aim, first, loss, nearest, residual2
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.report import Result

# E[x xᵀ] counts for this much of its mean more in each direction, so that those which no input had are ranked, too
DAMPING = 1e-6


@dataclass(frozen=True, slots=True)
class Cut:
    """A change at a smaller rank, and squares of what is lost and was there: of the change, and of the outputs."""

    a: Array
    b: Array
    error2: float
    norm2: float
    output_error2: float
    output_norm2: float

    @property
    def metrics(self) -> dict[str, float]:
        """Of the change, and of the outputs."""
        return loss(self.error2, self.norm2) | self.outputs

    @property
    def outputs(self) -> dict[str, float]:
        """What is lost of E||D x||²."""
        return {
            "output_error": share(self.output_error2, self.output_norm2),
            "output_error2": self.output_error2, "output_norm2": self.output_norm2,
        }  # fmt: skip

    @property
    def unweighted(self) -> dict[str, float]:
        """The same numbers where this is what would be made without looking at inputs."""
        return {
            "unweighted_error": share(self.error2, self.norm2),
            "unweighted_output_error": share(self.output_error2, self.output_norm2),
            "unweighted_error2": self.error2, "unweighted_output_error2": self.output_error2,
        }  # fmt: skip


def share(error2: float, norm2: float) -> float:
    """The relative error; 0 of nothing."""
    return math.sqrt(error2 / norm2) if norm2 else 0.0


def totals(results: Sequence[Result]) -> dict[str, float]:
    """The errors of outputs over all modules; {} where none is stated."""
    if not any("output_norm2" in r.metrics for r in results):
        return {}
    sums = {
        key: sum(r.metrics.get(key, 0.0) for r in results)
        for key in ("norm2", "output_norm2", "output_error2", "unweighted_error2", "unweighted_output_error2")
    }  # fmt: skip
    error = share(sums["output_error2"], sums["output_norm2"])
    found = {"output_error": error, "output_energy": max(0.0, 1 - error**2)}
    if any("unweighted_error2" in r.metrics for r in results):
        found["unweighted_error"] = share(sums["unweighted_error2"], sums["norm2"])
        found["unweighted_output_error"] = share(
            sums["unweighted_output_error2"], sums["output_norm2"]
        )
    return found


class Product:
    """A change B A, a float32 [k, in] and b [out, k], as what it does to outputs shows it."""

    def __init__(self, a: Array, b: Array, moment: Moment) -> None:
        self._turned = moment.turned
        if moment.turned:
            a, b = b.T, a.T
        self._a = a.astype(np.float64)
        self._q, rb = np.linalg.qr(b.astype(np.float64))
        self._rb = rb
        self._core = rb @ np.asarray(np.linalg.qr(self._a.T, mode="r")).T
        self._second = rb @ moment.second @ rb.T
        damped = self._second + DAMPING * moment.mean * self._core @ self._core.T
        values, vectors = np.linalg.eigh(damped)
        self._vectors = vectors[:, ::-1]
        # E||D x||² by rank, falling
        self.energy: Array = np.maximum(values[::-1], 0.0)

    @property
    def output_norm2(self) -> float:
        """E||D x||²."""
        return float(np.trace(self._second))

    def cut(self, rank: int) -> Cut:
        """The part of this rank that changes the outputs least."""
        return self._cut(self._vectors[:, :rank])

    def plain(self, rank: int) -> Cut:
        """The part of this rank that is nearest as a matrix."""
        left, _, _ = np.linalg.svd(self._core)
        return self._cut(left[:, :rank])

    def _cut(self, left: Array) -> Cut:
        rows = (left.T @ self._rb) @ self._a
        a, b = balanced(rows, self._q @ left)
        kept, whole = square(left.T @ self._core), square(self._core)
        output = float(np.trace(left.T @ self._second @ left))
        return Cut(
            *((b.T, a.T) if self._turned else (a, b)), max(0.0, whole - kept), whole,
            max(0.0, self.output_norm2 - output), self.output_norm2,
        )  # fmt: skip


def balanced(a: Array, b: Array) -> tuple[Array, Array]:
    """The same product with the norm of each rank on both sides, float32."""
    norms = np.linalg.norm(a, axis=1)
    half = np.sqrt(np.where(norms == 0, 1.0, norms))
    return (a / half[:, None]).astype(np.float32), (b * half).astype(np.float32)


def cut_matrix(delta: Array, aim: Aim, moment: Moment) -> tuple[Cut, Cut]:
    """A change float32 [out, in] by what it does to outputs; and, at the same rank, as a matrix is nearest."""
    seen = np.ascontiguousarray(delta.T if moment.turned else delta)
    root = _root(moment)
    weighed = _times(seen, root)
    found, rank = first(weighed, aim)
    left = found.u[:, :rank]
    a, b, _, _ = nearest(seen, Aim(rank, exact=aim.exact))
    of = (seen, weighed, root, moment)
    return _measured(*of, balanced(left.T @ seen, left)), _measured(*of, (a, b))


def _root(moment: Moment) -> Array:
    """L float32 [in, in], or its diagonal [in]."""
    extra = DAMPING * moment.mean
    if moment.second.ndim == 1:
        return np.sqrt(moment.second + extra).astype(np.float32)
    damped = moment.second + extra * np.eye(moment.columns)
    return np.linalg.cholesky(damped).astype(np.float32)


def _times(x: Array, root: Array) -> Array:
    found: Array = x * root if root.ndim == 1 else x @ root
    return found


def _measured(
    seen: Array, weighed: Array, root: Array, moment: Moment, pair: tuple[Array, Array]
) -> Cut:
    a, b = pair
    whole, error2 = square(seen), residual2(seen, a, b)
    # what damping has added is taken out again
    extra = DAMPING * moment.mean
    output_error2 = residual2(weighed, _times(a, root), b) - extra * error2
    output = square(weighed) - extra * whole
    if moment.turned:
        a, b = (np.ascontiguousarray(x.T) for x in (b, a))
    return Cut(a, b, error2, whole, max(0.0, output_error2), max(0.0, output))
