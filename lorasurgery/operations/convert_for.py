"""Write an adapter as one runtime really reads it: nothing lost, or by --rank, or refused with the reason."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import UsageError
from lorasurgery.model import Model, open_model
from lorasurgery.naming import Names
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.made import name_of, nbytes, usable
from lorasurgery.operations.algebra.nearest import check_rank, total
from lorasurgery.operations.runtimes.fit import fit
from lorasurgery.operations.runtimes.near import Near, nearest
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import completed


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Which runtime; the base, where names, row order or a change depend on it; what may be left out.

    rank: of the nearest LoRA, where the runtime does not read a variant and no small LoRA equals it.
    """

    runtime: str
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)
    rank: int | None = None


def convert_for(path: Path, output: Path | None, options: FitOptions, how: RunOptions) -> Report:
    """The adapter at `path` for a runtime of `lint --for`; no output: only the report.

    Raises MatchError for what the runtime cannot hold, UnknownNameError for one that is not known,
    UsageError for a rank where nothing is approximated, and for a base that is needed.
    """
    started = time.perf_counter()
    check_rank(options.rank)
    adapter = open_adapter(path)
    base = options.base
    inputs = {"adapter": adapter.path} | ({"base": base} if base else {})
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    model = open_model(base) if base else None
    if model is not None:
        adapter = _placed(completed(model, adapter), model)
    near = _near(adapter, options, model, how)
    fitted = fit(near.adapter, options.runtime, model)
    sites = fitted.adapter.sites
    pairs = zip(fitted.origins, sites, strict=True)
    results = tuple(_result(near, before, after) for before, after in pairs)
    settings = {"for": options.runtime, "rank": options.rank, "dtype": options.form.dtype}
    lost = total(results) if near.lost else {}
    size = {"modules": len(sites), "bytes": float(sum(nbytes(site) for site in sites))}
    outcome = Outcome(
        "convert", fitted.adapter, inputs, settings, results, {**size, **lost},
        (*notes, *fitted.notes), started,
    )  # fmt: skip
    return publish(outcome, output, replace(options.form, dialect=fitted.dialect), how)


def _placed(adapter: Adapter, model: Model) -> Adapter:
    """Without what this base has no place for, and need not have."""
    names = Names(model.weights, [name_of(site) for site in adapter.sites])
    sites = tuple(s for s in adapter.sites if not s.optional or names.find(name_of(s)))
    return replace(adapter, sites=sites)


def _near(adapter: Adapter, options: FitOptions, model: Model | None, how: RunOptions) -> Near:
    if options.rank is None:
        return Near(adapter, {}, {})
    near = nearest(adapter, options.runtime, options.rank, model, how)
    if not near.lost:
        raise UsageError("--for: decides on ranks, scale and layout itself. Take the others away.")
    return near


def _result(near: Near, before: Site, after: Site) -> Result:
    was = near.origins.get(id(before), before)
    metrics = {
        "rank_before": float(was.config.rank), **near.lost.get(id(before), {}),
        "rank": float(after.config.rank), "bytes": float(nbytes(after)),
    }  # fmt: skip
    return Result(name_of(after), metrics, {}, {})
