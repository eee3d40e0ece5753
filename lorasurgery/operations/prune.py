"""Make an adapter smaller: the best approximation of each module's change, at ranks that one budget sets.

The error is what was cut off, exactly: ||D - D'||² is the sum of the squares of the singular values left out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import UsageError
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.activations.calibration import Calibration, inputs_of
from lorasurgery.operations.activations.gather import gather
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.weighed import totals
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.drop import DropOptions, dropped
from lorasurgery.operations.algebra.made import each, name_of, usable, with_sites
from lorasurgery.operations.algebra.nearest import check_energy, check_rank, total
from lorasurgery.operations.algebra.prune_sites import Pruning, relative
from lorasurgery.operations.algebra.ranks import Spectrum, at_most, keeping, within
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import completed
from lorasurgery.tensors import BITS

# what a rank counts by: ||D||², that relative to ||W||², or E||D x||²
By = Literal["change", "base", "activations"]


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """Just one of rank, energy, parameters, size and drop."""

    rank: int | None = None
    energy: float | None = None
    parameters: int | None = None
    size: int | None = None  # bytes
    allowed_ranks: tuple[int, ...] = ()
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)
    by: By | None = None
    calibration: Calibration | None = None
    drop: DropOptions | None = None

    def check(self) -> None:
        """Raises UsageError or ValueRangeError."""
        ways = (self.rank, self.energy, self.parameters, self.size, self.drop)
        if sum(way is not None for way in ways) != 1:
            raise UsageError(
                "prune: needs one of --rank, --energy, --budget and --drop. Pass just one."
            )
        self._check_measure()
        if self.drop:
            self.drop.check()
        check_rank(self.rank)
        check_energy(self.energy)
        for rank in self.allowed_ranks:
            check_rank(rank, "--ranks-allowed")

    def _check_measure(self) -> None:
        """Raises UsageError for a measure without what it needs, or a text that nothing looks at."""
        if self.drop and (self.by or self.allowed_ranks):
            raise UsageError("--drop: keeps the ranks. Take --by and --ranks-allowed away.")
        if self.measure == "base" and self.base is None:
            raise UsageError("--by base: counts by the base's weights. Pass --base DIR.")
        looks = self.drop is not None or self.measure == "activations"
        if looks and self.calibration is None:
            flag = "--drop" if self.drop else "--by activations"
            raise UsageError(f"{flag}: looks at inputs. Pass --calibrate TEXT and --base DIR.")
        if self.calibration:
            if not looks:
                raise UsageError(
                    "--calibrate: is for --by activations and --drop. Pass one of them."
                )
            self.calibration.check(self.base)

    @property
    def measure(self) -> By:
        """What a change counts by; a base that is given is meant to count."""
        return self.by or ("base" if self.base and not self.drop else "change")

    @property
    def settings(self) -> dict[str, object]:
        return {
            "rank": self.rank, "energy": self.energy, "budget": self.budget, "by": self.measure,
            "ranks_allowed": list(self.allowed_ranks), "dtype": self.form.dtype,
            **(self.calibration.settings if self.calibration else {}),
            **(self.drop.settings if self.drop else {}),
        }  # fmt: skip

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
    inputs = inputs_of(adapter.path, options.base, options.calibration)
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    model = open_model(options.base) if options.base else None
    moments = None
    if model:
        adapter = completed(model, adapter)
    if model and options.calibration:
        found = gather(adapter, site_weights(model, adapter), options.calibration, how)
        moments, notes = found.moments, notes + found.notes
        adapter = with_sites(adapter, [s for s in adapter.sites if name_of(s) in moments])
    sites, results = (
        dropped(adapter, moments, options.drop)
        if options.drop and moments is not None
        else _cut_down(adapter, moments, options, how)
    )
    lost = total(results) | totals(results)
    outcome = Outcome(
        "prune", with_sites(adapter, sites), inputs, options.settings, tuple(results),
        {"modules": len(sites), **_gone(results, options), **lost}, notes, started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _gone(results: Sequence[Result], options: PruneOptions) -> dict[str, float]:
    if options.drop:
        held = sum(r.metrics["kept"] for r in results)
        return {"kept_modules": held, "dropped": len(results) - held}
    return {"dropped": sum(not r.metrics["rank"] for r in results)}


def _cut_down(
    adapter: Adapter, moments: Mapping[str, Moment] | None, options: PruneOptions, how: RunOptions
) -> tuple[list[Site], list[Result]]:
    """The sites at the ranks that the budget gives them, those without one left out."""
    work = Pruning(adapter, moments, options.form.dtype)
    spectra = each(adapter.sites, work.spectrum, how)
    if options.measure == "base":
        assert options.base is not None
        spectra = relative(spectra, open_model(options.base), adapter)
    ranks = _plan(spectra, options)
    made = [work.cut(*of) for of in zip(adapter.sites, spectra, ranks, strict=True)]
    return [site for site, r in made if r.metrics["rank"]], [result for _, result in made]


def _plan(spectra: Sequence[Spectrum], options: PruneOptions) -> list[int]:
    if options.rank is not None:
        return at_most(spectra, options.rank, options.allowed_ranks)
    if options.energy is not None:
        return keeping(spectra, options.energy, options.allowed_ranks)
    assert options.budget is not None
    return within(spectra, options.budget, options.allowed_ranks)
