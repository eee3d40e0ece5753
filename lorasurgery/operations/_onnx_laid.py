"""Adapters laid upon a graph: each part gets a place among its initializers, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorasurgery import targets
from lorasurgery.adapter import Adapter
from lorasurgery.errors import UsageError
from lorasurgery.export._onnx_modules import Modules
from lorasurgery.model import Model
from lorasurgery.operations.unmerge import lost_parts, subtractable
from lorasurgery.problems import Problem, refuse
from lorasurgery.targets import Resolved
from lorasurgery.tensors import FLOATS


@dataclass(frozen=True, slots=True)
class Laid:
    """Where everything goes, and what was left out."""

    resolved: Resolved
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """What is changed, each name once."""
        of = self.resolved
        return list(dict.fromkeys([*of.targets, *of.added, *of.replaced]))


def plain(adapter: Adapter) -> Adapter:
    """The adapter with weights meant as [out, in], as ONNX files are seen, whatever the trainer stored."""
    return replace(adapter, sites=tuple(replace(s, fan_in_fan_out=False) for s in adapter.sites))


def lay_upon(
    model: Model, view: Modules, adapters: Sequence[tuple[Adapter, float]], allowed: Sequence[str]
) -> Laid:
    """Raises MatchError for what has no place, UsageError where nothing is left or a whole tensor is weighed."""
    return _laid(model, view, adapters, allowed, [])


def lay_out_of(
    model: Model, view: Modules, adapters: Sequence[tuple[Adapter, float]], allowed: Sequence[str]
) -> Laid:
    """What is subtracted; the rest is lost, and stays only where that is allowed."""
    negated = [(adapter, -weight) for adapter, weight in adapters]
    return _laid(model, view, subtractable(negated), allowed, lost_parts(adapters))


def lay_factors(
    model: Model, view: Modules, adapter: tuple[Adapter, float], allowed: Sequence[str]
) -> Laid:
    """What is a product of the input; the rest is refused, or left out where that is allowed."""
    opened, weight = adapter
    wholes = [
        Problem(name, f"{name}: the adapter brings it beside its factors, which can be no input")
        for name in (*opened.replaced, *opened.added)
    ]
    factors = replace(opened, replaced={}, added={})
    return _laid(model, view, [(factors, weight)], allowed, wholes)


def _laid(
    model: Model,
    view: Modules,
    adapters: Sequence[tuple[Adapter, float]],
    allowed: Sequence[str],
    lost: list[Problem],
) -> Laid:
    resolved = targets.combine([targets.resolve(model, a, weight) for a, weight in adapters])
    wrong = _misfits(view, resolved)
    problems = [*lost, *resolved.problems, *targets.unmatched(model, resolved), *wrong]
    where = ", ".join(str(a.path) for a, _ in adapters)
    left = refuse(where, problems, allowed)
    resolved = _without(resolved, {problem.name for problem in wrong})
    if not (resolved.targets or resolved.replaced or resolved.added):
        raise UsageError(f"{view.path}: nothing is left of the adapter to merge.")
    for name, whole in resolved.replaced.items():
        if whole.weight != 1.0 and name not in resolved.targets:
            raise UsageError(
                f"{whole.adapter.path}: weight {whole.weight:g}: it replaces {name} as a whole, which "
                "cannot be weighed. Merge it with weight 1."
            )
    return Laid(resolved, tuple(f"left out: {problem.message}." for problem in left))


def _misfits(view: Modules, resolved: Resolved) -> list[Problem]:
    """Replacements that the graph has no room for, and changes of what cannot be told apart."""
    problems = []
    for name, whole in resolved.replaced.items():
        if name not in view:
            message = f"the adapter brings it whole, but {view.path} has no such tensor"
        elif (shape := view.info(name).shape) != whole.info.shape:
            message = f"the adapter replaces it by {list(whole.info.shape)}, but the graph has {list(shape)}"
        else:
            continue
        problems.append(Problem(name, f"{name}: {message}"))
    wrong = {problem.name for problem in problems}
    for name in {**resolved.targets, **resolved.added, **resolved.replaced}:
        if name in wrong:
            continue
        place, info = view.places[name], view.info(name)
        if not place.alone and not place.inputs:
            message = f"several nodes use {place.initializer}, and which of them are the module's is not told"
            problems.append(Problem(name, f"{name}: {message}"))
        elif info.dtype not in FLOATS and name not in resolved.replaced:
            message = f"{info.dtype} holds codes. Merge before it is quantized"
            problems.append(Problem(name, f"{name}: {message}"))
    return problems


def _without(resolved: Resolved, names: set[str]) -> Resolved:
    return replace(
        resolved,
        targets={n: t for n, t in resolved.targets.items() if n not in names},
        replaced={n: w for n, w in resolved.replaced.items() if n not in names},
        added={n: w for n, w in resolved.added.items() if n not in names},
    )
