"""Ways to make one change of several, element by element: each takes deltas that are weighed already.

TIES: Yadav et al. 2023, arXiv 2306.01708, §4 (trim, elect a sign, mean of those that agree). DARE: Yu et
al. 2023, arXiv 2311.03099, §3.2 (drop by chance, rescale what is left).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import blake3
import numpy as np

from lorasurgery.arrays import Array

Deltas = Sequence[Array]


def magnitude_prune(deltas: Deltas, density: float, chance: np.random.Generator) -> Array:  # noqa: ARG001
    """The sum of what is largest in each."""
    return _sum([_largest(d, density) for d in deltas])


def ties(deltas: Deltas, density: float, chance: np.random.Generator) -> Array:  # noqa: ARG001
    """The mean of those of the largest that agree with the majority's sign."""
    return _agreeing([_largest(d, density) for d in deltas])


def dare_linear(deltas: Deltas, density: float, chance: np.random.Generator) -> Array:
    """The sum of what chance leaves of each, scaled up to what was there."""
    return _sum([_dropped(d, density, chance) for d in deltas])


def dare_ties(deltas: Deltas, density: float, chance: np.random.Generator) -> Array:
    """As TIES, but trimmed by chance."""
    return _agreeing([_dropped(d, density, chance) for d in deltas])


METHODS: dict[str, Callable[[Deltas, float, np.random.Generator], Array]] = {
    f.__name__: f for f in (ties, dare_linear, dare_ties, magnitude_prune)
}


def chance_of(name: str, seed: int) -> np.random.Generator:
    """Chances of its own for each module, whatever the order and the threads."""
    digest = blake3.blake3(f"{seed} {name}".encode()).digest(8)
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _largest(delta: Array, density: float) -> Array:
    """All but this share of the elements becomes zero, the smallest first."""
    kept = int(density * delta.size)
    if kept >= delta.size:
        return delta
    flat = delta.reshape(-1)
    found = np.zeros_like(flat)
    if kept:
        largest = np.argpartition(np.abs(flat), flat.size - kept)[flat.size - kept :]
        found[largest] = flat[largest]
    return found.reshape(delta.shape)


def _dropped(delta: Array, density: float, chance: np.random.Generator) -> Array:
    mask = chance.random(delta.shape, dtype=np.float32) < density
    return np.where(mask, delta / np.float32(density), np.float32(0))


def _agreeing(deltas: Deltas) -> Array:
    sign = np.where(_sum(deltas) >= 0, np.float32(1), np.float32(-1))
    agree = [d * sign > 0 for d in deltas]
    count = np.maximum(1, np.sum(agree, axis=0, dtype=np.float32))
    mean: Array = _sum([np.where(a, d, np.float32(0)) for a, d in zip(agree, deltas, strict=True)])
    return mean / count


def _sum(deltas: Deltas) -> Array:
    total = deltas[0].copy()
    for delta in deltas[1:]:
        total += delta
    return total
