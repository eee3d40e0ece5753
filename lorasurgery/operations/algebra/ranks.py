"""One budget over all modules: which singular values of which are worth their parameters.

As AdaLoRA (Zhang et al. 2023, arXiv 2303.10512, §3.3) ranks triplets over the whole model, but after
training, and by what each is worth: the energy that it holds, for each parameter that it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ValueRangeError


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One module: the energy of each rank float64 [k], falling; what a rank costs; how much it counts."""

    name: str
    energy: Array
    cost: int
    shapes: tuple[tuple[int, ...], tuple[int, ...]]  # of A and B, now
    weight: float = 1.0
    least: int = 0  # the rank below which it cannot go

    def worth(self, low: int, high: int) -> float:
        """Of ranks low:high, for each parameter."""
        return self.weight * float(self.energy[low:high].sum()) / ((high - low) * self.cost)


def levels(spectrum: Spectrum, allowed: Sequence[int], most: int | None = None) -> list[int]:
    """The ranks that a module may end with: 0, and those allowed up to the first that holds all of it."""
    full = len(spectrum.energy)
    if not allowed:
        return list(range(min(full, most or full) + 1))
    fit = sorted(r for r in set(allowed) if most is None or r <= most)
    return [0, *(r for i, r in enumerate(fit) if i == 0 or fit[i - 1] < full)]


def at_most(spectra: Sequence[Spectrum], rank: int, allowed: Sequence[int]) -> list[int]:
    """The same bound for all."""
    if allowed and rank < min(allowed):
        raise ValueRangeError(
            f"--rank {rank}: is below every rank of --ranks-allowed ({_list(allowed)}). Raise it."
        )
    return [levels(s, allowed, rank)[-1] for s in spectra]


def within(spectra: Sequence[Spectrum], budget: int, allowed: Sequence[int]) -> list[int]:
    """The ranks of at most `budget` parameters in all, the best steps first."""
    ranks = _least(spectra, allowed)
    left = budget - sum(r * s.cost for r, s in zip(ranks, spectra, strict=True))
    if left < 0:
        raise ValueRangeError(
            f"--budget: {budget} parameters, but modules whose bias is adapted need {budget - left}. "
            "Raise it."
        )
    stuck: set[int] = set()
    for _, i, low, high in _steps(spectra, allowed):
        price = (high - low) * spectra[i].cost
        if low < ranks[i] or i in stuck:
            continue
        if price > left:
            stuck.add(i)  # its later steps hold less
            continue
        ranks[i], left = high, left - price
    return ranks


def keeping(spectra: Sequence[Spectrum], share: float, allowed: Sequence[int]) -> list[int]:
    """The ranks that keep this share of all energy, the best steps first."""
    ranks = _least(spectra, allowed)
    total = sum(s.weight * float(s.energy.sum()) for s in spectra)
    held = sum(s.weight * float(s.energy[:r].sum()) for s, r in zip(spectra, ranks, strict=True))
    for _, i, low, high in _steps(spectra, allowed):
        # as many roundings as there are modules
        if held >= share * total * (1 - 1e-12):
            break
        if low >= ranks[i]:
            ranks[i] = high
            held += spectra[i].weight * float(spectra[i].energy[low:high].sum())
    return ranks


def _least(spectra: Sequence[Spectrum], allowed: Sequence[int]) -> list[int]:
    return [next(r for r in levels(s, allowed) if r >= s.least) for s in spectra]


def _steps(
    spectra: Sequence[Spectrum], allowed: Sequence[int]
) -> list[tuple[float, int, int, int]]:
    """(worth, module, from rank, to rank), the best first; within a module they come in order.

    A step that holds nothing is none.
    """
    steps = []
    for i, spectrum in enumerate(spectra):
        ladder = levels(spectrum, allowed)
        for low, high in pairwise(ladder):
            worth = spectrum.worth(low, high)
            if worth > 0:
                steps.append((worth, i, low, high))
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2]))


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def spectrum_of(values: Array) -> Array:
    """Energy by rank [k] of singular values [k], or [experts, k] which share their rank."""
    energy: Array = np.square(values).reshape(-1, values.shape[-1]).sum(axis=0)
    return energy
