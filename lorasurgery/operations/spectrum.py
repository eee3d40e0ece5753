"""The spectrum of an adapter: singular values of each module's change, its effective rank, its size beside W."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site, Variant
from lorasurgery.arrays import Array
from lorasurgery.change import Change, LowRank
from lorasurgery.errors import UsageError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.svd import singular_values
from lorasurgery.problems import refuse
from lorasurgery.targets import resolve, unmatched


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
        change = target.change(partial(model.weights.read, name))
        # a stack whose change is of one matrix is seen as that matrix
        n, _, columns = change.shape
        w = model.weights.read(name).astype(np.float32).reshape(n, -1, columns)
        yield from _spectra(name, change, w)
        model.weights.release(name)


def _spectra(name: str, change: Change, w: Array | None) -> Iterator[Spectrum]:
    count, rows, _ = change.shape
    for n in range(count):
        if isinstance(change, LowRank):
            values = singular_values(change.a[n], change.b[n])
        else:
            values = np.linalg.svd(change.part(n, 0, rows), compute_uv=False)
        size = float(np.linalg.norm(w[n])) if w is not None else 0.0
        relative = float(np.linalg.norm(values)) / size if size else None
        label = name if count == 1 else f"{name}[{n}]"
        yield Spectrum(label, change.rank, tuple(map(float, values)), relative)
