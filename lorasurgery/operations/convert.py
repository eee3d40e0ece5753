"""Write an adapter as another variant, or for a runtime that reads less than PEFT: with the loss stated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import UsageError
from lorasurgery.model import Model, open_model
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
from lorasurgery.operations.algebra.bias_sites import biases_added
from lorasurgery.operations.algebra.convert_site import Conversion, Converted, convert_site
from lorasurgery.operations.algebra.made import (
    each,
    kept,
    name_of,
    nbytes,
    usable,
    variant_of,
    with_sites,
)
from lorasurgery.operations.algebra.nearest import Aim, check_rank, total
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.operations.algebra.svd import padded
from lorasurgery.operations.layouts.layout import Layout
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import completed


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`folded`: alpha = rank, the scale in B; `uniform`: one rank for all modules, zeros where it was less.

    `to`: "" keeps each module's variant, where a layout is all that is asked for.
    """

    to: str = "lora"
    layout: Layout = field(default_factory=Layout)
    base: Path | None = None
    aim: Aim = field(default_factory=Aim)
    folded: bool = False
    uniform: bool = False
    allowed_ranks: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)
    calibration: Calibration | None = None

    def check(self) -> None:
        """Raises UnknownNameError, UsageError or ValueRangeError."""
        if self.to or not self.layout.asked:
            plugins.load("adapters", self.to)
        self.aim.check()
        self.layout.check()
        for rank in self.allowed_ranks:
            check_rank(rank, "--ranks-allowed")
        if self.calibration:
            self._check_calibration(self.calibration)
        if self.padded and self.to != "lora":
            raise UsageError(
                f"--to {self.to or 'VARIANT'}: --uniform-rank and --ranks-allowed are of LoRA. "
                + ("Take them away." if self.to else "Pass --to lora.")
            )

    def _check_calibration(self, calibration: Calibration) -> None:
        calibration.check(self.base)
        if self.layout.asked:
            raise UsageError(
                "--calibrate: runs modules as they are. Convert once more for --projections and --experts."
            )
        if self.capped.rank is None and self.capped.energy is None:
            raise UsageError(
                "--calibrate: weighs what is cut off, and nothing is. Pass --rank or --energy."
            )

    @property
    def padded(self) -> bool:
        return self.uniform or bool(self.allowed_ranks)

    @property
    def capped(self) -> Aim:
        """No rank above those allowed."""
        if not self.allowed_ranks:
            return self.aim
        most = max(self.allowed_ranks)
        return replace(self.aim, rank=min(self.aim.rank or most, most))

    @property
    def settings(self) -> dict[str, object]:
        return {
            "to": self.to, **self.aim.settings, "bake_scale": self.folded, "uniform_rank": self.uniform,
            "ranks_allowed": list(self.allowed_ranks), "dtype": self.form.dtype, **self.layout.settings,
            **(self.calibration.settings if self.calibration else {}),
        }  # fmt: skip


def convert(path: Path, output: Path | None, options: ConvertOptions, how: RunOptions) -> Report:
    """Write the adapter at `path` as `options` say; no output: only the report.

    Raises UsageError where the base or a rank is needed, MatchError where there is no way.
    """
    started = time.perf_counter()
    options.check()
    adapter = open_adapter(path)
    inputs = inputs_of(adapter.path, options.base, options.calibration)
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    model = open_model(options.base) if options.base else None
    if model is not None:
        adapter = replace(completed(model, adapter), base_config=model.config)
    moments = None
    if model is not None and options.calibration:
        seen = gather(adapter, site_weights(model, adapter), options.calibration, how)
        moments, notes = seen.moments, notes + seen.notes
    relaid = options.layout.before(adapter, model)
    made, results = _converted(relaid, model, options, how, moments)
    last = options.layout.after(made, model)
    shown = _shown(made, last, results)
    exact = sum(int(r.metrics["exact_form"]) for r in shown)
    outcome = Outcome(
        "convert", biases_added(last.adapter), inputs, options.settings, shown,
        {"modules": len(shown), "exact_modules": exact, **total(results), **totals(results)},
        (*notes, *relaid.notes, *last.notes), started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _shown(made: Adapter, last: Relaid, results: tuple[Result, ...]) -> tuple[Result, ...]:
    """A row for each site that is written, of those before the last layout."""
    if len(last.adapter.sites) == len(results):
        return results
    pairs = zip(last.origins, last.adapter.sites, strict=True)
    by = {id(site): result for site, result in zip(made.sites, results, strict=True)}
    return tuple(_of_part(by[id(old)], new) for old, new in pairs)


def _converted(
    relaid: Relaid,
    model: Model | None,
    options: ConvertOptions,
    how: RunOptions,
    moments: Mapping[str, Moment] | None,
) -> tuple[Adapter, tuple[Result, ...]]:
    """Every site as the wanted variant and rank, and a row of the report for it."""
    adapter = relaid.adapter
    kept_as_it_is = (
        options.layout.asked
        and options.to in ("", "lora")
        and all(
            variant_of(site).LINEAR_IN_W or site.config.variant == options.to or not options.to
            for site in adapter.sites
        )
    )
    weights = None if model is None or kept_as_it_is else site_weights(model, adapter)
    pairs = list(zip(relaid.origins, adapter.sites, strict=True))
    if weights is not None:  # what this base has no place for, and need not have, is left out
        pairs = [(old, site) for old, site in pairs if name_of(site) in weights.shares]
    folded = options.folded or options.padded
    work = Conversion(adapter, options.to, options.capped, weights, folded, moments)

    def convert_one(site: Site) -> Converted:
        return convert_site(replace(work, to=options.to or site.config.variant), site)

    found = each([site for _, site in pairs], convert_one, how)
    sites = [c.site for c in found]
    sites = _with_ranks(sites, options) if options.padded else sites
    rows = zip(pairs, found, sites, strict=True)
    return with_sites(adapter, sites), tuple(_result(old, c, site) for (old, _), c, site in rows)


def _of_part(of: Result, site: Site) -> Result:
    """A part's row: what is lost of the whole is not dealt out."""
    kept_whole = {k: of.metrics[k] for k in ("exact_form", "rank_before") if k in of.metrics}
    own = {"rank": float(site.config.rank), "bytes": float(nbytes(site))}
    return Result(name_of(site), {**kept_whole, **own}, {}, {})


def _result(before: Site, converted: Converted, site: Site) -> Result:
    metrics = {
        "exact_form": float(converted.exact), "rank_before": float(before.config.rank),
        **converted.metrics, "rank": float(site.config.rank), "bytes": float(nbytes(site)),
    }  # fmt: skip
    return Result(name_of(site), metrics, {}, {})


def _with_ranks(sites: Sequence[Site], options: ConvertOptions) -> list[Site]:
    """Zeros up to the next rank that is allowed, or up to the one that all are to have."""
    ranks = [site.config.rank for site in sites]
    if options.uniform:
        ranks = [max(ranks, default=1)] * len(ranks)
    allowed = sorted(options.allowed_ranks)
    wanted = [next((r for r in allowed if r >= rank), rank) for rank in ranks]
    return [_padded(site, rank) for site, rank in zip(sites, wanted, strict=True)]


def _padded(site: Site, rank: int) -> Site:
    held = site.load()
    return kept(site, *padded(held["A"], held["B"], rank))
