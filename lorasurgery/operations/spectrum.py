"""The spectrum of an adapter: singular values of each module's change, its effective rank, its size beside W."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site, Variant
from lorasurgery.arrays import Array
from lorasurgery.change import Dense, LowRank, widened
from lorasurgery.errors import UsageError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.problems import refuse
from lorasurgery.targets import Target, resolve, unmatched


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Of one matrix that is changed: a tensor, or one expert's part of it (`name[3]`).

    `relative` is ||D|| / ||W||, None without a base. `effective_rank` is the exponential of the
    entropy of the singular values (Roy and Vetterli 2007): 1 for a rank-one change, r for r equal ones.
    """

    name: str
    rank: int
    values: tuple[float, ...]
    relative: float | None = None

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.values))

    @property
    def effective_rank(self) -> float:
        total = sum(self.values)
        if not total:
            return 0.0
        shares = np.array([v / total for v in self.values if v > 0])
        return float(np.exp(-np.sum(shares * np.log(shares))))


def spectra(adapter: Path, base: Path | None, allowed: Sequence[str] = ()) -> list[Spectrum]:
    """Every changed matrix. Raises UsageError for a variant whose change cannot be told without a base."""
    opened = open_adapter(adapter)
    if base is not None:
        return list(_upon(open_model(base), opened, allowed))
    return [found for site in opened.sites for found in _alone(opened, site)]


def _alone(adapter: Adapter, site: Site) -> Iterator[Spectrum]:
    variant = cast(Variant, plugins.load("adapters", site.config.variant))
    form = variant.low_rank(site.load(), site.config)
    if form is None:
        raise UsageError(
            f"{adapter.path}: {site.module} is {site.config.variant}, whose change depends on the base. "
            "Pass --base BASE."
        )
    a, b = form if form[0].ndim == 3 else (form[0][None], form[1][None])
    yield from _spectra(f"{site.module}.{site.parameter}", LowRank(a, b), None)


def _upon(model: Model, adapter: Adapter, allowed: Sequence[str]) -> Iterator[Spectrum]:
    resolved = resolve(model, adapter)
    refuse(adapter.path, [*resolved.problems, *unmatched(model, resolved)], allowed)
    for name, target in resolved.targets.items():
        yield from _spectra(name, *_changed(model, target))
        model.weights.release(name)


def _changed(model: Model, target: Target) -> tuple[LowRank | Dense, Array]:
    w = widened(model.weights.read(target.tensor))
    change = target.change(lambda: w)
    # a stack whose change is of one matrix is seen as that matrix
    seen = len(change.a) if isinstance(change, LowRank) else len(change.d)
    return change, w.reshape(seen, -1, change.columns)


def _spectra(name: str, change: LowRank | Dense, w: Array | None) -> Iterator[Spectrum]:
    count = len(change.a) if isinstance(change, LowRank) else len(change.d)
    for n in range(count):
        if isinstance(change, LowRank):
            values = singular_values(change.a[n], change.b[n])
        else:
            values = np.linalg.svd(change.d[n], compute_uv=False)
        size = float(np.linalg.norm(w[n])) if w is not None else 0.0
        relative = float(np.linalg.norm(values)) / size if size else None
        label = name if count == 1 else f"{name}[{n}]"
        yield Spectrum(label, change.rank, tuple(map(float, values)), relative)


def singular_values(a: Array, b: Array) -> Array:
    """Of B A, from the factors alone: of the product of the triangles of their QR, at most r x r."""
    left: Array = np.linalg.qr(b.astype(np.float64), mode="r")  # type: ignore[assignment]
    right: Array = np.linalg.qr(a.T.astype(np.float64), mode="r")  # type: ignore[assignment]
    values: Array = np.linalg.svd(left @ right.T, compute_uv=False)
    return values
