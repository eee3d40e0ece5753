"""Write an adapter as another variant, or for a runtime that reads less than PEFT: with the loss stated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.activations.calibration import inputs_of
from lorasurgery.operations.activations.gather import gather
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.routers import OnText, note_of
from lorasurgery.operations.activations.weighed import totals
from lorasurgery.operations.algebra.adapter_output import (
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.bias_sites import biases_added
from lorasurgery.operations.algebra.convert_options import ConvertOptions
from lorasurgery.operations.algebra.convert_site import Conversion, Converted, convert_site
from lorasurgery.operations.algebra.into import Form
from lorasurgery.operations.algebra.made import (
    each,
    kept,
    name_of,
    nbytes,
    usable,
    variant_of,
    with_sites,
)
from lorasurgery.operations.algebra.mixture import of_mixture, routed, unrouted
from lorasurgery.operations.algebra.nearest import total
from lorasurgery.operations.algebra.site_weights import SiteWeights, site_weights
from lorasurgery.operations.algebra.svd import padded
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.operations.runtimes.dotted import dotted
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import completed


def convert(path: Path, output: Path | None, options: ConvertOptions, how: RunOptions) -> Report:
    """Write the adapter at `path` as `options` say; no output: only the report.

    Raises UsageError where the base or a rank is needed, MatchError where there is no way.
    """
    started = time.perf_counter()
    options.check()
    adapter = options.start.open(path) if options.start else open_adapter(path)
    inputs = inputs_of(adapter.path, options.base, options.calibration) | options.start.inputs
    check_ready(output, inputs, how)
    notes = list(usable(adapter, options.allowed))
    model = open_model(options.base) if options.base else None
    if model is not None:
        adapter = replace(completed(model, adapter), base_config=model.config)
        adapter = _named(adapter, model, options)
    parts, text = {".": adapter}, None
    if options.to and options.to not in {s.config.variant for s in adapter.sites if routed(s)}:
        text = _on_text(adapter, model, options)
        seen = text.gates(how) if text and options.mixture.measured else adapter
        parts = unrouted(seen, options.mixture)
    made = {folder: _made(part, model, options, how) for folder, part in parts.items()}
    shown = tuple(replace(r, name=_under(f, r)) for f, part in made.items() for r in part.shown)
    results = [result for part in made.values() for result in part.results]
    notes += [note for part in made.values() for note in part.notes]
    routers = {name_of(s) for s in adapter.sites if routed(s)}
    more: dict[str, float] = {}
    if options.mixture.fixed and routers:
        lacking = text.errors(made["."].adapter, how) if text else {}
        shown = tuple(of_mixture(shown, routers, lacking))
        results = [r for r in results if r.name not in routers]
        more = {k: v for k, v in totals(shown).items() if lacking and k == "output_error"}
        notes += note_of(len(routers), options.calibration if lacking else None)
    exact = sum(int(r.metrics["exact_form"]) for r in shown)
    written = {folder: part.adapter for folder, part in made.items()}
    outcome = Outcome(
        "convert", next(iter(written.values())), inputs, options.settings, shown,
        {"modules": len(shown), "exact_modules": exact, **_totals(results), **more},
        tuple(notes), started, written,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _named(adapter: Adapter, model: Model, options: ConvertOptions) -> Adapter:
    """With the model's own names, where kohya's joined ones are not to be written again."""
    wanted = options.form.dialect
    if wanted is None and options.to not in ("", *plugins.load("dialects", "kohya").VARIANTS):
        wanted = "peft"
    if adapter.dialect != "kohya" or wanted in (None, "kohya"):
        return adapter
    return dotted(adapter, model, parts=wanted == "diffusers").adapter


def _on_text(adapter: Adapter, model: Model | None, options: ConvertOptions) -> OnText | None:
    """What runs the mixture itself, where gates that are fixed stand for it and a text is given."""
    if not options.mixture.fixed or options.calibration is None or model is None:
        return None
    if not any(map(routed, adapter.sites)):
        return None
    return OnText(adapter, site_weights(model, adapter, routed=True), options.calibration)


@dataclass(frozen=True, slots=True)
class _Made:
    """An adapter that is written, its rows of the report, and those in which losses were measured."""

    adapter: Adapter
    shown: tuple[Result, ...]
    results: tuple[Result, ...]
    notes: tuple[str, ...]


def _made(adapter: Adapter, model: Model | None, options: ConvertOptions, how: RunOptions) -> _Made:
    seen = None
    if model is not None and options.calibration and options.cut:
        seen = gather(adapter, site_weights(model, adapter), options.calibration, how)
    relaid = options.layout.before(adapter, model)
    moments = seen.moments if seen else None
    made, results = _converted(relaid, model, options, how, moments)
    last = options.layout.after(made, model)
    shown = _shown(made, last, results)
    more = (*(seen.notes if seen else ()), *relaid.notes, *last.notes)
    return _Made(biases_added(last.adapter), shown, results, more)


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
    work = _conversion(adapter, weights, options, moments)

    def convert_one(site: Site) -> Converted:
        form = work.form if options.to else Form(site.config.variant)
        return convert_site(replace(work, form=form), site)

    found = each([site for _, site in pairs], convert_one, how)
    sites = [c.site for c in found]
    sites = _with_ranks(sites, options) if options.padded else sites
    rows = zip(pairs, found, sites, strict=True)
    made = with_sites(work.adapter, sites)
    return made, tuple(_result(old, c, site) for (old, _), c, site in rows)


def _conversion(
    adapter: Adapter,
    weights: SiteWeights | None,
    options: ConvertOptions,
    moments: Mapping[str, Moment] | None,
) -> Conversion:
    folded, residual = options.folded or options.padded, options.start.residual
    chosen = replace(options.chosen, rank=options.aim.rank)
    form = chosen.form(options.to, _widest(adapter.sites)) if options.to else Form("lora")
    if residual is None or weights is None:
        return Conversion(adapter, form, options.capped, weights, folded, moments=moments)
    # the change of the base is that of the residual, and what W lost to it
    left = site_weights(open_model(residual), adapter)
    adapter = replace(adapter, base=str(options.base))
    return Conversion(adapter, form, options.capped, weights, folded, left)


def _widest(sites: Sequence[Site]) -> tuple[int, int]:
    """The most outputs and inputs that any weight has, as far as the factors tell."""
    sizes = [site.size for site in sites]
    return max((out or 0 for out, _ in sizes), default=0), max(
        (i or 0 for _, i in sizes), default=0
    )


def _totals(results: Sequence[Result]) -> dict[str, float]:
    return {**total(results), **totals(results)} if results else {}


def _under(folder: str, result: Result) -> str:
    return result.name if folder == "." else f"{folder}/{result.name}"


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
