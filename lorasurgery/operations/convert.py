"""Write an adapter as another variant, or for a runtime that reads less than PEFT: with the loss stated."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.convert_site import Conversion, Converted, convert_site
from lorasurgery.operations.algebra.into import Chosen
from lorasurgery.operations.algebra.made import each, kept, name_of, nbytes, usable, with_sites
from lorasurgery.operations.algebra.mixture import Mixture, routed, unrouted
from lorasurgery.operations.algebra.nearest import Aim, check_rank, total
from lorasurgery.operations.algebra.site_weights import SiteWeights, site_weights
from lorasurgery.operations.algebra.started import Start
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
    mixture: Mixture = field(default_factory=Mixture)
    chosen: Chosen = field(default_factory=Chosen)
    start: Start = field(default_factory=Start)
    folded: bool = False
    uniform: bool = False
    allowed_ranks: tuple[int, ...] = ()
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)

    def check(self) -> None:
        """Raises UnknownNameError, UsageError or ValueRangeError."""
        plugins.load("adapters", self.to)
        self.aim.check()
        self.mixture.check()
        self.start.check()
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
    adapter = options.start.open(path) if options.start else open_adapter(path)
    inputs = {"adapter": adapter.path} | ({"base": options.base} if options.base else {})
    inputs |= options.start.inputs
    check_ready(output, inputs, how)
    notes = list(usable(adapter, options.allowed))
    parts = {".": adapter}
    if options.to not in {s.config.variant for s in adapter.sites if routed(s)}:
        parts = unrouted(adapter, options.mixture)
    fixed = {name_of(s) for s in adapter.sites if routed(s)} if "." in parts else set[str]()
    made = {folder: _convert(part, options, how) for folder, part in parts.items()}
    pairs = [(folder, pair) for folder, (_, of) in made.items() for pair in of]
    results = tuple(_result(folder, before, c, fixed) for folder, (before, c) in pairs)
    if some := [r for r in results if "mixture_error" in r.metrics]:
        notes.append(
            f"in {len(some)} modules fixed gates stand for the router, whose error only text would show: "
            "exact where the gates do not depend on the token."
        )
    known = [r for r in results if "mixture_error" not in r.metrics]
    counts = {
        "modules": len(results),
        "exact_modules": sum(r.metrics["exact_form"] for r in results),
    }
    written = {folder: part for folder, (part, _) in made.items()}
    outcome = Outcome(
        "convert", next(iter(written.values())), inputs, options.settings, results,
        {**counts, **(total(known) if known else {})}, tuple(notes), started,
        written,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _convert(
    adapter: Adapter, options: ConvertOptions, how: RunOptions
) -> tuple[Adapter, list[tuple[Site, Converted]]]:
    """The adapter that is written, and what each of its sites was."""
    weights = None
    if options.base:
        model = open_model(options.base)
        weights = site_weights(model, adapter)
        adapter = replace(_present(completed(model, adapter), weights), base_config=model.config)
    folded = options.folded or options.padded
    chosen = replace(options.chosen, rank=options.aim.rank)
    form = chosen.form(options.to, _widest(adapter.sites))
    residual = options.start.residual
    if (
        residual and weights
    ):  # the change of the base is that of the residual, and what W lost to it
        left = site_weights(open_model(residual), adapter)
        adapter = replace(adapter, base=str(options.base))
        work = Conversion(adapter, form, options.capped, weights, folded, left)
    else:
        work = Conversion(adapter, form, options.capped, weights, folded)
    found = each(adapter.sites, lambda site: convert_site(work, site), how)
    sites = [c.site for c in found]
    sites = _with_ranks(sites, options) if options.padded else sites
    pairs = [
        (before, replace(c, site=site))
        for before, c, site in zip(adapter.sites, found, sites, strict=True)
    ]
    return with_sites(adapter, sites), pairs


def _present(adapter: Adapter, weights: SiteWeights) -> Adapter:
    """Without what does nothing to this base. Raises MatchError for a bias, which others have no form for."""
    sites = tuple(site for site in adapter.sites if weights.has(site))
    if some := next((site for site in sites if site.parameter == "bias"), None):
        raise MatchError(
            f"{adapter.path}: {name_of(some)} is scaled with its weight, which no factors of others do. "
            "Merge it."
        )
    return replace(adapter, sites=sites)


def _widest(sites: Sequence[Site]) -> tuple[int, int]:
    """The most outputs and inputs that any weight has, as far as the factors tell."""
    sizes = [site.size for site in sites]
    return max((out or 0 for out, _ in sizes), default=0), max(
        (i or 0 for _, i in sizes), default=0
    )


def _result(folder: str, before: Site, converted: Converted, fixed: Collection[str]) -> Result:
    site, metrics = converted.site, dict(converted.metrics)
    name, exact = name_of(site), converted.exact
    if name in fixed:  # what was cut off is of the mixture; the router's part is not known
        exact, cut = False, metrics["relative_error"]
        lost = ("relative_error", "weight_error", "energy", "error2", "norm2")
        metrics = {k: v for k, v in metrics.items() if k not in lost} | {"mixture_error": cut}
    shown = {
        "exact_form": float(exact), "rank_before": float(before.config.rank), **metrics,
        "rank": float(site.config.rank), "bytes": float(nbytes(site)),
    }  # fmt: skip
    return Result(name if folder == "." else f"{folder}/{name}", shown, {}, {})


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
