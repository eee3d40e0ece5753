"""Why a change is not the one intended: what people and tools usually get wrong, tried one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.adapter import Site
from lorasurgery.arrays import Array
from lorasurgery.change import LowRank
from lorasurgery.operations.verifying.measure import Measure
from lorasurgery.operations.verifying.pairs import Pair
from lorasurgery.target import Share, Target

_PROBES = 24  # the effective rank comes out within about a fifth


@dataclass(slots=True)
class Trial:
    """Another change that may have been made instead: <C, D'> and ||D'||²."""

    cause: str
    change: LowRank
    power: float
    signal: float = 0.0

    def left2(self, change2: float) -> float:
        """||C - D'||²."""
        return change2 - 2 * self.signal + self.power


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What a second walk through a tensor found."""

    trials: tuple[Trial, ...] = ()
    coefficients: tuple[float, ...] = ()  # how often each share's change is in it; () for one share
    effective_rank: float = 0.0  # of C - rho D: (sum of σ²)² / sum of σ⁴; 0 for a stack of experts

    def best(self, left2: float, change2: float) -> Trial | None:
        """The mistake that leaves less than half of what rho D leaves, if there is one."""
        best = min(self.trials, key=lambda t: t.left2(change2), default=None)
        return best if best and best.left2(change2) < left2 / 2 else None


def diagnose(pair: Pair, target: Target, change: LowRank, found: Measure) -> Diagnosis:
    """Try the usual mistakes on a tensor that does not hold."""
    trials = [Trial(cause, d, inner(d, d)) for cause, d in alternatives(target, change)]
    shares = [Trial("", _alone(target, (share,)), 0.0) for share in target.shares]
    single = len(change.a) == 1
    probes = np.random.default_rng(0).standard_normal((change.a.shape[2], _PROBES))
    probes = probes.astype(np.float32)
    images = np.zeros(probes.shape)
    rho = np.float32(found.rho or 0.0)
    for tile in pair.tiles(change):
        done = tile.merged.astype(np.float32) - tile.w
        for trial in (*trials, *(shares if shares[1:] else ())):
            b = trial.change.b[tile.expert, tile.row : tile.row + len(tile.b)]
            a = trial.change.a[tile.expert]
            trial.signal += float(np.sum((b.T @ done) * a, dtype=np.float64))
        if single:
            image = done @ probes - rho * (tile.b @ (tile.a @ probes))
            images += done.T @ image - rho * (tile.a.T @ (tile.b.T @ image))
    pair.release()
    fourth = float(np.square(images).sum()) / _PROBES
    effective = sum(found.left()) ** 2 / fourth if single and fourth else 0.0
    return Diagnosis(tuple(trials), _coefficients(shares), effective)


def _coefficients(shares: list[Trial]) -> tuple[float, ...]:
    """Least squares: the sum of x_i D_i that is nearest to what was done."""
    if len(shares) < 2:
        return ()
    gram = np.array([[inner(one.change, two.change) for two in shares] for one in shares])
    found, *_ = np.linalg.lstsq(gram, np.array([share.signal for share in shares]))
    return tuple(map(float, found))


def alternatives(target: Target, change: LowRank) -> Iterator[tuple[str, LowRank]]:
    """Changes that mistakes in the layout of the factors make of this one."""
    n, rows, columns = len(change.a), change.b.shape[1], change.a.shape[2]
    if rows == columns:
        turned = LowRank(change.b.transpose(0, 2, 1).copy(), change.a.transpose(0, 2, 1).copy())
        yield (
            "transposed: it is Dᵀ that was added (B and A swapped, or [in, out] for [out, in])",
            turned,
        )
    for shift in {1, n - 1} - {0, n} if n > 1 else ():
        rolled = LowRank(np.roll(change.a, shift, axis=0), np.roll(change.b, shift, axis=0))
        yield f"in another order of experts: they are shifted by {shift} of {n}", rolled
    orders: tuple[tuple[str, Callable[[Site], Site]], ...] = (
        ("B was read with the expert slowest; it varies fastest", _b_slowest),
        ("A was read with the expert fastest; it varies slowest", _a_fastest),
        (
            "A was read with the expert fastest and B with it slowest",
            lambda s: _a_fastest(_b_slowest(s)),
        ),
    )
    if any(share.site.layout == "experts" for share in target.shares):
        for cause, misread in orders:
            shares = tuple(_misread(share, misread) for share in target.shares)
            yield f"in another order of experts: {cause}", _alone(target, shares)


def _alone(target: Target, shares: tuple[Share, ...]) -> LowRank:
    change = Target(target.tensor, shares).change()
    assert isinstance(change, LowRank)
    return change


def inner(one: LowRank, two: LowRank) -> float:
    """<B1 A1, B2 A2>, from the factors alone."""
    b = one.b.transpose(0, 2, 1).astype(np.float64) @ two.b
    a = one.a.astype(np.float64) @ two.a.transpose(0, 2, 1)
    return float(np.sum(b * a))


def _misread(share: Share, misread: Callable[[Site], Site]) -> Share:
    return replace(share, site=misread(share.site)) if share.site.layout == "experts" else share


def _b_slowest(site: Site) -> Site:
    def load() -> Mapping[str, Array]:
        factors = site.load()
        b = factors["B"]  # [experts, out, r]
        experts, out, rank = b.shape
        flat = b.transpose(1, 2, 0)  # as it is stored: [out, r * experts]
        return {**factors, "B": flat.reshape(out, experts, rank).transpose(1, 0, 2)}

    return replace(site, load=load)


def _a_fastest(site: Site) -> Site:
    def load() -> Mapping[str, Array]:
        factors = site.load()
        a = factors["A"]  # [experts, r, in]
        experts, rank, in_ = a.shape
        return {**factors, "A": a.reshape(rank, experts, in_).transpose(1, 0, 2)}

    return replace(site, load=load)
