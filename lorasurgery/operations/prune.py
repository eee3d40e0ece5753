"""Make an adapter smaller: the best approximation of each module's change, at ranks that one budget sets.

The error is what was cut off, exactly: ||D - D'||² is the sum of the squares of the singular values left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.edit import tile_rows
from lorasurgery.errors import UsageError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.made import (
    each,
    lora_site,
    low_rank,
    name_of,
    remembering,
    usable,
    with_sites,
)
from lorasurgery.operations.algebra.nearest import check_energy, check_rank, loss, total
from lorasurgery.operations.algebra.ranks import Spectrum, at_most, keeping, spectrum_of, within
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.operations.algebra.svd import of_product, singular_values
from lorasurgery.report import Report, Result
from lorasurgery.surgery import TILE_BYTES, RunOptions
from lorasurgery.tensors import BITS


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Just one of rank, energy, parameters and size; `base` weighs each change by its weight's norm."""

    rank: int | None = None
    energy: float | None = None
    parameters: int | None = None
    size: int | None = None  # bytes
    allowed_ranks: tuple[int, ...] = ()
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)

    def check(self) -> None:
        """Raises UsageError or ValueRangeError."""
        given = [x is not None for x in (self.rank, self.energy, self.parameters, self.size)]
        if sum(given) != 1:
            raise UsageError("prune: needs one of --rank, --energy and --budget. Pass just one.")
        check_rank(self.rank)
        check_energy(self.energy)
        for rank in self.allowed_ranks:
            check_rank(rank, "--ranks-allowed")

    @property
    def budget(self) -> int | None:
        """In parameters."""
        if self.size is not None:
            return self.size * 8 // BITS[self.form.dtype]
        return self.parameters


def prune(path: Path, output: Path | None, options: PruneOptions, how: RunOptions) -> Report:
    """Write the adapter at `path` with smaller ranks; no output: only the report.

    Raises MatchError for a module that has no low-rank form or no weight in the base.
    """
    started = time.perf_counter()
    options.check()
    adapter = open_adapter(path)
    inputs = {"adapter": adapter.path} | ({"base": options.base} if options.base else {})
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    spectra = each(adapter.sites, lambda site: _spectrum(adapter, site), how)
    if options.base:
        spectra = _relative(spectra, open_model(options.base), adapter)
    ranks = _plan(spectra, options)
    made = [
        (_cut(adapter, site, spectrum, rank), _result(spectrum, rank, options))
        for site, spectrum, rank in zip(adapter.sites, spectra, ranks, strict=True)
    ]
    results = tuple(result for _, result in made)
    sites = tuple(site for site, result in made if result.metrics["rank"])
    settings = {
        "rank": options.rank, "energy": options.energy, "budget": options.budget,
        "ranks_allowed": list(options.allowed_ranks), "dtype": options.form.dtype,
    }  # fmt: skip
    outcome = Outcome(
        "prune", with_sites(adapter, sites), inputs, settings, results,
        {"modules": len(sites), "dropped": len(results) - len(sites), **total(results)},
        notes, started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _spectrum(adapter: Adapter, site: Site) -> Spectrum:
    a, b = low_rank(adapter, site)
    values = singular_values(a, b)
    experts = a.shape[0] if a.ndim == 3 else 1
    # PEFT has a bias only beside a LoRA
    least = int(f"{site.module}.bias" in adapter.added)
    cost = experts * (a.shape[-1] + b.shape[-2])
    return Spectrum(name_of(site), spectrum_of(values), cost, (a.shape, b.shape), least=least)


def _plan(spectra: Sequence[Spectrum], options: PruneOptions) -> list[int]:
    if options.rank is not None:
        return at_most(spectra, options.rank, options.allowed_ranks)
    if options.energy is not None:
        return keeping(spectra, options.energy, options.allowed_ranks)
    assert options.budget is not None
    return within(spectra, options.budget, options.allowed_ranks)


def _cut(adapter: Adapter, site: Site, spectrum: Spectrum, rank: int) -> Site:
    """The site at this rank; its factors are made when they are written."""
    a, b = spectrum.shapes

    def load() -> tuple[Array, Array]:
        return of_product(*low_rank(adapter, site)).factors(rank)

    shapes = ((*a[:-2], max(1, rank), a[-1]), (*b[:-1], max(1, rank)))
    return lora_site(site, shapes, remembering(load))


def _result(spectrum: Spectrum, rank: int, options: PruneOptions) -> Result:
    cut, whole = float(spectrum.energy[rank:].sum()), float(spectrum.energy.sum())
    metrics = {
        "rank_before": float(len(spectrum.energy)), "rank": float(rank), **loss(cut, whole),
        "bytes": rank * spectrum.cost * BITS[options.form.dtype] / 8,
    }  # fmt: skip
    return Result(spectrum.name, metrics, {}, {})


def _relative(spectra: Sequence[Spectrum], model: Model, adapter: Adapter) -> list[Spectrum]:
    """Each module counts by the part of its weight that its change is."""
    norms = _norms(model, adapter)
    return [replace(s, weight=1 / norms[s.name] if norms[s.name] else 0.0) for s in spectra]


def _norms(model: Model, adapter: Adapter) -> dict[str, float]:
    """||W||² of all tensors that hold a module's weight."""
    found = site_weights(model, adapter).shares
    return {n: sum(_square(model, s.part.tensor) for s in of) for n, of in found.items()}


def _square(model: Model, name: str) -> float:
    info, read = model.weights.info(name), model.weights.read
    step, rows = tile_rows(info, 1, TILE_BYTES), info.shape[0]
    found = sum(_energy(read, name, start, start + step) for start in range(0, rows, step))
    model.weights.release(name)
    return found


def _energy(read: Callable[[str, int, int], Array], name: str, start: int, stop: int) -> float:
    import numpy as np

    wide = read(name, start, stop).astype(np.float32).reshape(-1)
    return float(np.dot(wide, wide))
