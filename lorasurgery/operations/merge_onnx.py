"""Merge adapters into the initializers of an ONNX file, or take them out: W' = round(W + Σ s B A)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorasurgery import targets
from lorasurgery.adapter import Adapter
from lorasurgery.errors import VerificationError
from lorasurgery.export._onnx_edit import Edited, open_for_surgery
from lorasurgery.export._onnx_merge import Merging, put
from lorasurgery.export._onnx_modules import Modules, open_modules
from lorasurgery.export._onnx_write import check_file
from lorasurgery.model import Model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_output import Deed, deliver
from lorasurgery.operations.merging.edits import Rounding
from lorasurgery.operations.merging.retained import Sums, total
from lorasurgery.problems import Problem, refuse
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import Resolved


@dataclass(frozen=True, slots=True)
class OnnxMergeOptions:
    """`names` maps modules to initializers or nodes; the others are derived. `out` takes adapters out."""

    names: Mapping[str, str] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    rounding: Rounding = field(default_factory=Rounding)
    min_retained: float | None = None
    out: bool = False


def merge_onnx(
    base: Path,
    adapters: Sequence[str],
    output: Path | None,
    options: OnnxMergeOptions,
    how: RunOptions,
) -> Report:
    """Write the model with the adapters merged in; with no output, only compute the report.

    Raises MatchError for a part that has no place, VerificationError where less was kept than asked for.
    """
    started = time.perf_counter()
    if output:
        check_file(output, base, overwrite=how.output.overwrite)
    edited = open_for_surgery(base)
    model, view = open_modules(edited.file, options.names)
    opened = [(plain(a), -w if options.out else w) for a, w in open_adapters(adapters)]
    resolved, notes = lay_upon(model, opened, options.allowed)
    merged, more = _merge(edited, view, resolved, options)
    operation = "unmerge" if options.out else "merge"

    def report(nbytes: int) -> Report:
        results = tuple(_result(one) for one in merged)
        sums = total(results)
        counts = {"tensors": len(results), "others": len(view) - len(results)}
        size = {"bytes": float(nbytes)} if nbytes else {}
        return Report(
            operation, results, time.perf_counter() - started, {**counts, **sums.metrics(), **size},
            (*notes, *more),
        )  # fmt: skip

    def check() -> None:
        kept = total(tuple(_result(one) for one in merged)).retained
        if options.min_retained is not None and kept < options.min_retained:
            raise VerificationError(
                f"{operation}: retained signal is {kept:.3f}, less than --min-retained "
                f"{options.min_retained:g}: nothing was written. --rounding stochastic --seed 0 keeps it "
                "on average, a float32 export all of it."
            )

    inputs = {"base": base, **{f"adapter {i}": a.path for i, (a, _) in enumerate(opened, 1)}}
    settings = {
        "adapters": list(adapters), "map": dict(options.names), "seed": options.rounding.seed,
    }  # fmt: skip
    found = deliver(edited, output, how, Deed(report, settings, inputs, check))
    check()
    return found


def plain(adapter: Adapter) -> Adapter:
    """The adapter with weights meant as [out, in], as ONNX files are seen, whatever the trainer stored."""
    return replace(adapter, sites=tuple(replace(s, fan_in_fan_out=False) for s in adapter.sites))


def lay_upon(
    model: Model, adapters: Sequence[tuple[Adapter, float]], allowed: Sequence[str]
) -> tuple[Resolved, list[str]]:
    """Where everything goes, and what was left out; whole tensors have no place in a graph."""
    resolved = targets.combine([targets.resolve(model, a, weight) for a, weight in adapters])
    whole = [*resolved.replaced, *resolved.added]
    problems = [
        *resolved.problems,
        *targets.unmatched(model, resolved),
        *(Problem(n, f"{n}: the adapter brings it whole, which no ONNX file takes") for n in whole),
    ]
    left = refuse(", ".join(str(a.path) for a, _ in adapters), problems, allowed)
    return resolved, [f"left out: {problem.message}." for problem in left]


def _merge(
    edited: Edited, view: Modules, resolved: Resolved, options: OnnxMergeOptions
) -> tuple[list[Merging], list[str]]:
    merged, notes = [], []
    for name, target in resolved.targets.items():
        linear = view.linears[name]
        one = Merging(edited.file, linear, target, options.rounding.of(name))
        put(edited, one)
        merged.append(one)
        if not linear.alone:
            notes.append(
                f"{linear.module}: shared {linear.initializer}, and has a weight of its own now."
            )
    return merged, notes


def _result(one: Merging) -> Result:
    """`module <- initializer`, unless one says the other."""
    sums = Sums()
    for of_tile in one.finish():
        sums.add(*of_tile)
    own = one.linear.initializer == f"{one.linear.module}.weight"
    name = one.linear.module if own else f"{one.linear.module} <- {one.linear.initializer}"
    return Result(name, {**sums.metrics(), "rank": one.rank}, one.read, one.written)
