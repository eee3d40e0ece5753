"""Merge adapters into the initializers of an ONNX file, or take them out: W' = round(W + ΔW)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lorasurgery import targets
from lorasurgery.change import Change, Rows
from lorasurgery.errors import VerificationError
from lorasurgery.export._onnx_edit import open_for_surgery
from lorasurgery.export._onnx_merge import Merging, put
from lorasurgery.export._onnx_modules import Modules, open_modules
from lorasurgery.export._onnx_write import check_file
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_laid import Laid, lay_out_of, lay_upon, plain
from lorasurgery.operations._onnx_output import Deed, deliver
from lorasurgery.operations.merging.edits import Rounding
from lorasurgery.operations.merging.retained import Sums, total
from lorasurgery.operations.undoing.onnx_record import keeping_base
from lorasurgery.operations.undoing.undo_file import check_target
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.targets import Whole


@dataclass(frozen=True, slots=True)
class OnnxMergeOptions:
    """`names` maps modules to initializers or nodes; the others are derived. `out` takes adapters out.

    undo: a file to be written that brings the base back byte for byte.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()
    rounding: Rounding = field(default_factory=Rounding)
    min_retained: float | None = None
    out: bool = False
    undo: Path | None = None

    @property
    def operation(self) -> str:
        return "unmerge" if self.out else "merge"


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
    _check_places(base, output, options, overwrite=how.output.overwrite)
    edited = open_for_surgery(base)
    model, view = open_modules(edited.file, options.names)
    opened = [(plain(adapter), weight) for adapter, weight in open_adapters(adapters, model)]
    laid = (lay_out_of if options.out else lay_upon)(model, view, opened, options.allowed)
    merged = [_merging(view, name, laid, options) for name in laid.names]
    for one in merged:
        put(edited, one)
    deed = Deed(
        lambda nbytes: replace(
            _report(view, merged, laid, options, nbytes), seconds=time.perf_counter() - started
        ),
        {"adapters": list(adapters), "map": dict(options.names), "seed": options.rounding.seed},
        {"base": base, **{f"adapter {i}": a.path for i, (a, _) in enumerate(opened, 1)}},
        partial(_check, merged, options),
    )
    if output is None or options.undo is None:
        found = deliver(edited, output, how, deed)
        deed.check()
        return found
    with keeping_base(options.undo, edited, merged, opened) as assemble:

        def complete() -> None:
            deed.check()
            assemble()

        return deliver(edited, output, how, replace(deed, check=complete))


def _check_places(
    base: Path, output: Path | None, options: OnnxMergeOptions, *, overwrite: bool
) -> None:
    if output:
        check_file(output, base, overwrite=overwrite)
        if options.undo:
            check_target(options.undo, output, overwrite=overwrite)


def _report(
    view: Modules, merged: Sequence[Merging], laid: Laid, options: OnnxMergeOptions, nbytes: int
) -> Report:
    results = tuple(map(_result, merged))
    counts = {
        "tensors": sum("signal" in r.metrics for r in results),
        "replaced": sum("replaced" in r.metrics for r in results),
        "others": len(view) - len(results),
    }
    size = {"bytes": float(nbytes)} if nbytes else {}
    numbers = {**counts, **total(results).metrics(), **size}
    return Report(options.operation, results, 0.0, numbers, (*laid.notes, *_shared(merged)))


def _check(merged: Sequence[Merging], options: OnnxMergeOptions) -> None:
    kept = total(map(_result, merged)).retained
    if options.min_retained is not None and kept < options.min_retained:
        raise VerificationError(
            f"{options.operation}: retained signal is {kept:.3f}, less than --min-retained "
            f"{options.min_retained:g}: nothing was written. --rounding stochastic --seed 0 keeps it "
            "on average, a float32 export all of it."
        )


def _merging(view: Modules, name: str, laid: Laid, options: OnnxMergeOptions) -> Merging:
    resolved = laid.resolved
    whole = resolved.replaced.get(name)
    change: Callable[[Rows], Change] | None = None
    if name in resolved.targets:
        change = resolved.targets[name].change
    elif name in resolved.added:
        change = _bias(resolved.added[name])
    load = whole.load if whole else None
    return Merging(view, name, change, load, options.rounding.of(name))


def _bias(wholes: tuple[Whole, ...]) -> Callable[[Rows], Change]:
    return lambda _: targets.bias_change(wholes)


def _shared(merged: Sequence[Merging]) -> list[str]:
    """Notes on initializers that were divided."""
    return [
        f"{_module(one.name)}: shared {one.place.initializer}, and has "
        f"{'a bias' if one.name.endswith('.bias') else 'a weight'} of its own now."
        for one in merged
        if not one.place.alone
    ]


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")


def _result(one: Merging) -> Result:
    """`module <- initializer`, unless one says the other."""
    sums = Sums()
    for of_tile in one.finish():
        sums.add(*of_tile)
    shown = one.name.removesuffix(".weight") if one.name in one.view.linears else one.name
    own = one.place.initializer == one.name
    name = shown if own else f"{shown} <- {one.place.initializer}"
    facts = {"replaced": float(math.prod(one.place.shape))} if one.whole else {}
    metrics = {**sums.metrics(), "rank": one.rank} if one.change else {}
    return Result(name, {**metrics, **facts}, one.read, one.written)
