"""Which of these adapters is inside a model: min over c of ||W' - W - Σ cᵢ Dᵢ||², by the normal equations.

The Gram matrix <Dᵢ, Dⱼ> is made of factors, <W' - W, BA> of one product with W' - W: no Dᵢ is formed. A
coefficient of 1 says that the adapter was merged once, 0 that it was not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.change import LowRank, widened
from lorasurgery.errors import MatchError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations.algebra.interference import inner
from lorasurgery.operations.algebra.made import side_by_side, usable
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.target import Target
from lorasurgery.targets import resolve, unmatched

_Changes = dict[int, LowRank]  # by the adapter's number


@dataclass(frozen=True, slots=True)
class _Sums:
    """Over tensors: ||D||², <D, Dᵢ> [n] and <Dᵢ, Dⱼ> [n, n], float64."""

    whole: float
    sides: Array
    gram: Array


def inside(
    model: Path, base: Path, adapters: Sequence[str], allowed: tuple[str, ...], how: RunOptions
) -> Report:
    """A coefficient for each adapter (PATH or PATH:weight, times that weight).

    Raises MatchError for a part that the base has no place for, or a change that is no product.
    """
    started = time.perf_counter()
    new, old = open_model(model), open_model(base)
    opened = open_adapters(adapters)
    notes = [note for adapter, _ in opened for note in usable(adapter, allowed)]
    targets: dict[str, dict[int, Target]] = {}
    for i, (adapter, weight) in enumerate(opened):
        found = resolve(old, adapter, weight)
        left = {p.name for p in adapter.problems}
        problems = [p for p in found.problems if p.name not in left]
        if problems := [*problems, *unmatched(old, found)]:
            raise MatchError(f"{adapter.path}: {problems[0].message}. Check --base.")
        for tensor, target in found.targets.items():
            targets.setdefault(tensor, {})[i] = target
    _check(new, old, list(targets))
    items = [(t, old.weights.info(t).nbytes, t) for t in targets]
    parts = side_by_side(items, lambda t: _tensor((new, old), t, targets[t], len(opened)), how)
    sums = _Sums(
        sum(p.whole for p in parts), sum((p.sides for p in parts), np.zeros(len(opened))),
        sum((p.gram for p in parts), np.zeros((len(opened),) * 2)),
    )  # fmt: skip
    results, explained = _solve(sums, [f"{a.path}:{w:g}" for a, w in opened])
    total = {"tensors": len(targets), "explained": explained}
    return Report("inside", results, time.perf_counter() - started, total, tuple(notes))


def _check(new: Model, old: Model, names: Sequence[str]) -> None:
    for name in names:
        if name not in new.weights or new.weights.info(name).shape != old.weights.info(name).shape:
            raise MatchError(
                f"{new.path}: has no {name} of the base's shape. Check --inside and --base."
            )


def _tensor(
    models: tuple[Model, Model], name: str, targets: dict[int, Target], count: int
) -> _Sums:
    new, old = (m.weights.read(name) for m in models)
    d = widened(new) - widened(old)
    for model in models:
        model.weights.release(name)
    changes = {i: _low_rank(target) for i, target in targets.items()}
    sides, gram = np.zeros(count), np.zeros((count, count))
    for i, one in changes.items():
        seen = d.reshape(len(one.a), -1, one.a.shape[2])
        sides[i] = np.multiply(seen @ one.a.swapaxes(1, 2), one.b).sum(dtype=np.float64)
        for j, other in changes.items():
            gram[i, j] = inner((one.a, one.b), (other.a, other.b))
    return _Sums(square(d), sides, gram)


def _low_rank(target: Target) -> LowRank:
    change = target.change()
    if not isinstance(change, LowRank) or (change.rank == 0 and target.shares):
        raise MatchError(
            f"{target.tensor}: {target.shares[0].site.config.variant} makes no product of small factors. "
            "Convert it first: lorasurgery convert --to lora."
        )
    return change


def _solve(sums: _Sums, names: Sequence[str]) -> tuple[tuple[Result, ...], float]:
    """Coefficients in the least squares' sense; of adapters that are the same, each has its part."""
    found = np.linalg.lstsq(sums.gram, sums.sides, rcond=1e-10)[0]
    explained = float(found @ sums.sides) / sums.whole if sums.whole else 0.0
    power = np.diag(sums.gram)
    results = []
    for i, name in enumerate(names):
        alone = sums.sides[i] ** 2 / (power[i] * sums.whole) if power[i] * sums.whole else 0.0
        results.append(
            Result(name, {"coefficient": float(found[i]), "share": float(alone)}, {}, {})
        )
    return tuple(results), explained
