"""How two changes of one weight get in each other's way: angles between their subspaces, signs that differ.

The cosines of the principal angles are the singular values of UᵀV of orthonormal bases (Björck and Golub
1973); <B₁A₁, B₂A₂> = tr(A₂A₁ᵀ B₁ᵀB₂), so that no change is formed but a sample of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.operations.algebra.subspace import basis

Factors = tuple[Array, Array]  # A float32 [k, in] and B [out, k], or both with experts before

_ROWS = 256  # rows of a change whose signs are compared


def interference(forms: Sequence[Factors]) -> dict[str, float]:
    """Over all pairs: the smallest angles in degrees, and means of cosine and of sign conflicts; {} for one."""
    pairs = [
        (one, other)
        for a, b in combinations(forms, 2)
        for one, other in zip(_experts(a), _experts(b), strict=True)
    ]
    if not pairs:
        return {}
    bases = [(_angle(p[1], q[1]), _angle(p[0].T, q[0].T)) for p, q in pairs]
    return {
        "angle_out": min(out for out, _ in bases),
        "angle_in": min(in_ for _, in_ in bases),
        "cosine": float(np.mean([cosine(p, q) for p, q in pairs])),
        "sign_conflict": float(np.mean([conflict(p, q) for p, q in pairs])),
    }


def _experts(form: Factors) -> list[Factors]:
    a, b = form
    return list(zip(a, b, strict=True)) if a.ndim == 3 else [(a, b)]


def _angle(x: Array, y: Array) -> float:
    """The smallest angle in degrees between the spaces that columns span; 90 for nothing."""
    u, v = basis(x), basis(y)
    if 0 in (*u.shape, *v.shape):
        return 90.0
    closest = float(np.linalg.svd(u.T @ v, compute_uv=False)[0])
    return math.degrees(math.acos(min(1.0, closest)))


def inner(one: Factors, other: Factors) -> float:
    """<B₁A₁, B₂A₂>, over all experts."""
    (a, b), (c, d) = ((x.astype(np.float64), y.astype(np.float64)) for x, y in (one, other))
    return float(((b.swapaxes(-1, -2) @ d) * (a @ c.swapaxes(-1, -2))).sum())


def cosine(one: Factors, other: Factors) -> float:
    """Of the angle between two changes as vectors; 0 if one is nothing."""
    norms = inner(one, one) * inner(other, other)
    return inner(one, other) / math.sqrt(norms) if norms > 0 else 0.0


def conflict(one: Factors, other: Factors) -> float:
    """The share of elements that the two push in opposite directions, in a sample of rows."""
    step = -(-len(one[1]) // _ROWS)
    x, y = one[1][::step] @ one[0], other[1][::step] @ other[0]
    opposite: float = np.mean(np.sign(x) * np.sign(y) < 0)
    return float(opposite)
