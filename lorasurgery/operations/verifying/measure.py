"""What became of an intended change D in one tensor, and how much of the rest its rounding explains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorasurgery.arrays import NUMPY, Array
from lorasurgery.change import Change, LowRank
from lorasurgery.kernels import lora_delta
from lorasurgery.operations.algebra.subspace import Subspace, product, square
from lorasurgery.operations.verifying.pairs import Grid, Pair, Tile

# explicit bits of the significand, and the distance of the smallest numbers
_BITS = {"F32": 23, "BF16": 7, "F16": 10}
_SMALLEST = {"F32": 2.0**-149, "BF16": 2.0**-133, "F16": 2.0**-24}
# a merge in 16 bits rounds B A, and its product with the scale, before it adds: half an ulp each
DELTA_ERROR = {"F32": 0.0, "BF16": 2.0**-8, "F16": 2.0**-10}


@dataclass(slots=True)
class Measure:
    """Sums over a tensor. C = W' - W is what was done, E = C - D what should not have been."""

    numel: int = 0
    signal: float = 0.0  # <C, D>
    power: float = 0.0  # ||D||²
    change2: float = 0.0  # ||C||²
    noise2: float = 0.0  # ||E||²
    inside2: float = 0.0  # of E, in the adapter's subspace
    outside2: float = 0.0
    nearest2: float = 0.0  # ||E||² of W + D rounded to the nearest
    differing: int = 0  # elements that are not W + D rounded to the nearest
    excused: float = 0.0  # so many may differ, by the arithmetic before the rounding
    far: int = 0  # elements that no rounding of W + D gives
    chance: Chance | None = None  # where elements differ: if up or down was a matter of chance

    @property
    def rho(self) -> float | None:
        """<C, D> / ||D||²; None where no change was intended."""
        return self.signal / self.power if self.power else None

    @property
    def sigma(self) -> float:
        """What an error that knows nothing of D makes of rho: its size over sqrt(n)."""
        return math.sqrt(self.noise2 / self.power / self.numel) if self.power else 0.0

    def left(self) -> tuple[float, float]:
        """Inside² and outside² of C - rho D; D lies inside, so only that part shrinks."""
        rho = self.rho if self.rho is not None else 1.0
        return max(0.0, self.inside2 - (rho - 1) ** 2 * self.power), self.outside2


@dataclass(slots=True)
class Chance:
    """Rounding up with the odds of the distance x (in ulps): E² is x(1 - x) on average."""

    noise2: float = 0.0  # ||E||² as it is
    expected2: float = 0.0
    variance: float = 0.0  # of noise2
    signal_variance: float = 0.0  # of <E, D>

    def explains(self, slack2: float) -> bool:
        """Within six standard deviations: one tensor in 10^9 is wrongly refused."""
        off = abs(self.noise2 - self.expected2)
        # a thousandth for sums in float32
        return off <= 6 * math.sqrt(self.variance) + 1e-3 * self.expected2 + slack2


def measure(pair: Pair, change: Change, residual: LowRank | None = None) -> Measure:
    """Walk once through the tensor. `residual` is served beside the merged weight: C counts it."""
    found = Measure(chance=Chance())
    space = Subspace(change) if isinstance(change, LowRank) and change.rank else None
    grid = Grid(pair.merged, pair.packed) if pair.packed else None
    for tile in pair.tiles(change):
        d = tile.delta()
        done = tile.merged.astype(np.float32) - tile.w
        if residual is not None:
            rows = slice(tile.row, tile.row + len(tile.b))
            done += lora_delta.run(residual.a[tile.expert], residual.b[tile.expert, rows])
        error = done - d
        found.numel += d.size
        found.signal += product(done, d)
        found.power += square(d)
        found.change2 += square(done)
        found.noise2 += square(error)
        if space:
            space.add(tile.expert, tile.row, error)
        if grid:
            _codes(found, grid, tile, d)
        else:
            _rounding(found, tile, d, error, pair.scale)
    if space:
        found.inside2, found.outside2 = space.finish()
    else:
        found.outside2 = found.noise2
    pair.release()
    return found


def _rounding(found: Measure, tile: Tile, d: Array, error: Array, scale: float) -> None:
    """Compare with W + D rounded to the nearest, element by element."""
    kind = _code(tile.merged)
    wanted = tile.w + d
    nearest = wanted.astype(tile.merged.dtype)
    near = nearest.astype(np.float32)
    found.nearest2 += square(near - d - tile.w)
    got = tile.merged.astype(np.float32)
    # nan differs from itself, and is never what a rounding gives
    differs = ~(got == near)
    count = int(np.count_nonzero(differs))
    if not count:
        return
    ulp = _ulp(wanted, kind)
    doubt = _doubt(tile, d, kind, scale)
    found.differing += count
    found.excused += float(np.minimum(doubt / ulp, 1).sum(dtype=np.float64))
    # the neighbour on the other side is one ulp away, and 2^-10 pays for this very arithmetic
    found.far += int(np.count_nonzero(~(np.abs(got - near) <= ulp * (1 + 2**-10) + 2 * doubt)))
    assert found.chance is not None
    _chance(found.chance, np.abs(wanted - near) / ulp, ulp, (d, error))


def _chance(chance: Chance, x: Array, ulp: Array, of: tuple[Array, Array]) -> None:
    d, error = of
    step2 = ulp * ulp
    v = x * (1 - x)
    scaled = v * step2
    chance.noise2 += square(error)
    chance.expected2 += float(scaled.sum(dtype=np.float64))
    # E² is (x ulp)² or ((1 - x) ulp)², which are (1 - 2 x) ulp² apart
    chance.variance += float((v * np.square(step2 * (1 - 2 * x))).sum(dtype=np.float64))
    chance.signal_variance += float((scaled * d * d).sum(dtype=np.float64))


def _codes(found: Measure, grid: Grid, tile: Tile, d: Array) -> None:
    """Compare with the codes nearest to W + D, on the scales that are stored."""
    flat = (tile.w + d).reshape(-1)
    codes = grid.codes(tile.at, flat.size)
    found.nearest2 += grid.gap2(codes, tile.at) / 12
    if not grid.aligned(tile.at):
        found.differing += flat.size
        return
    found.differing += int(np.count_nonzero(codes != grid.nearest(flat, tile.at)))


def _code(array: Array) -> str:
    return next(code for code in _BITS if NUMPY[code] == array.dtype)


def _ulp(x: Array, kind: str) -> Array:
    """The distance of the two numbers of this dtype that x lies between: float32, as x."""
    power = (x.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    ulp: Array = np.maximum(power * np.float32(2.0 ** -_BITS[kind]), np.float32(_SMALLEST[kind]))
    return ulp


def _doubt(tile: Tile, d: Array, kind: str, scale: float) -> Array:
    """How far two right computations of D may be apart, element by element.

    A sum of k products in float32 is good to (k + 4) 2^-24 sum |b a|, and that sum is at most
    ||b|| ||a||; twice, for both may err. A change of the whole weight is good to 2^-18 of its terms. In 16 bits B A is rounded before the scale and after it: among
    the smallest numbers each by half of their distance.
    """
    lengths = np.outer(np.linalg.norm(tile.b, axis=1), np.linalg.norm(tile.a, axis=0))
    terms = np.float32((len(tile.a) + 4) * 2.0**-23) * lengths.astype(np.float32)
    if tile.given is not None:  # made of the whole weight, by products of unknown order
        sizes = np.abs(tile.w) + np.abs(d)
        # where w is 0, as often in NF4, terms as large as the row's others may have cancelled
        most = sizes.max(axis=1, keepdims=True, initial=0.0)
        terms = np.float32(2.0**-18) * sizes + np.float32(2.0**-21) * most
    doubt: Array = terms + np.float32(DELTA_ERROR[kind]) * np.abs(d)
    if kind != "F32" and len(tile.a):
        doubt += np.float32((1 + scale) * _SMALLEST[kind] / 2)
    return doubt
