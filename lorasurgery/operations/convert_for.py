"""Write an adapter as one runtime really reads it: nothing lost, or refused with the reason."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery.adapter import Site
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.made import name_of, nbytes, usable
from lorasurgery.operations.runtimes.fit import fit
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions


@dataclass(frozen=True, slots=True)
class FitOptions:
    """Which runtime; the base, where names or row order depend on it; what may be left out."""

    runtime: str
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)


def convert_for(path: Path, output: Path | None, options: FitOptions, how: RunOptions) -> Report:
    """The adapter at `path` for a runtime of `lint --for`; no output: only the report.

    Raises MatchError for what the runtime cannot hold, UnknownNameError for one that is not known.
    """
    started = time.perf_counter()
    adapter = open_adapter(path)
    base = options.base
    inputs = {"adapter": adapter.path} | ({"base": base} if base else {})
    check_ready(output, inputs, how)
    notes = usable(adapter, options.allowed)
    fitted = fit(adapter, options.runtime, open_model(base) if base else None)
    sites = fitted.adapter.sites
    pairs = zip(fitted.origins, sites, strict=True)
    results = tuple(_result(before, after) for before, after in pairs)
    settings = {"for": options.runtime, "dtype": options.form.dtype}
    total = {"modules": len(sites), "bytes": float(sum(nbytes(site) for site in sites))}
    outcome = Outcome(
        "convert",
        fitted.adapter,
        inputs,
        settings,
        results,
        total,
        (*notes, *fitted.notes),
        started,
    )
    return publish(outcome, output, replace(options.form, dialect=fitted.dialect), how)


def _result(before: Site, after: Site) -> Result:
    metrics = {
        "rank_before": float(before.config.rank), "rank": float(after.config.rank),
        "bytes": float(nbytes(after)),
    }  # fmt: skip
    return Result(name_of(after), metrics, {}, {})
