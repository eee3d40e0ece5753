"""Write an adapter as another variant, or for a runtime that reads less than PEFT: with the loss stated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery import plugins
from lorasurgery.adapter import Site
from lorasurgery.errors import UsageError
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.convert_site import Conversion, Converted, convert_site
from lorasurgery.operations.algebra.made import each, kept, name_of, nbytes, usable, with_sites
from lorasurgery.operations.algebra.nearest import Aim, check_rank, total
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.operations.algebra.svd import padded
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import completed


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`folded`: alpha = rank, the scale in B; `uniform`: one rank for all modules, zeros where it was less."""

    to: str = "lora"
    base: Path | None = None
    aim: Aim = field(default_factory=Aim)
    folded: bool = False
    uniform: bool = False
    allowed_ranks: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)

    def check(self) -> None:
        """Raises UnknownNameError, UsageError or ValueRangeError."""
        plugins.load("adapters", self.to)
        self.aim.check()
        for rank in self.allowed_ranks:
            check_rank(rank, "--ranks-allowed")
        if self.padded and self.to != "lora":
            raise UsageError(
                f"--to {self.to}: --uniform-rank and --ranks-allowed are of LoRA. Take them away."
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
            "ranks_allowed": list(self.allowed_ranks), "dtype": self.form.dtype,
        }  # fmt: skip


def convert(path: Path, output: Path | None, options: ConvertOptions, how: RunOptions) -> Report:
    """Write the adapter at `path` as `options` say; no output: only the report.

    Raises UsageError where the base or a rank is needed, MatchError where there is no way.
    """
    started = time.perf_counter()
    options.check()
    adapter = open_adapter(path)
    inputs = {"adapter": adapter.path} | ({"base": options.base} if options.base else {})
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    weights = None
    if options.base:
        model = open_model(options.base)
        weights = site_weights(model, adapter)
        adapter = replace(completed(model, adapter), base_config=model.config)
    folded = options.folded or options.padded
    work = Conversion(adapter, options.to, options.capped, weights, folded)
    found = each(adapter.sites, lambda site: convert_site(work, site), how)
    sites = (
        _with_ranks([c.site for c in found], options) if options.padded else [c.site for c in found]
    )
    results = tuple(
        _result(before, c, site)
        for before, c, site in zip(adapter.sites, found, sites, strict=True)
    )
    exact = sum(c.exact for c in found)
    outcome = Outcome(
        "convert", with_sites(adapter, sites), inputs, options.settings, results,
        {"modules": len(found), "exact_modules": exact, **total(results)}, notes, started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


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
