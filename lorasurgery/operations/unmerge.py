"""Take adapters out of a merged model: byte for byte with the undo file, to rounding without it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site, Variant
from lorasurgery.change import Change
from lorasurgery.checkpoint import MANIFEST
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.merging.retained import Sums, total
from lorasurgery.operations.merging.work import Work, lay_upon
from lorasurgery.operations.undoing.rebuild import Base, Rebuild
from lorasurgery.operations.undoing.undo_file import adapter_facts
from lorasurgery.operations.undoing.undo_read import UndoFile
from lorasurgery.problems import Problem, refuse
from lorasurgery.report import Report, Result
from lorasurgery.surgery import Plan, RunOptions, rehearse, run
from lorasurgery.targets import bias_change, combine, resolve
from lorasurgery.tied import settle


@dataclass(frozen=True, slots=True)
class UnmergeOptions:
    """undo: what `merge --undo` wrote. allowed: globs over parts that may stay as they are."""

    undo: Path | None = None
    tied: str = "auto"
    allowed: tuple[str, ...] = ()


def unmerge(
    merged: Path,
    adapters: Sequence[str],
    output: Path | None,
    options: UnmergeOptions,
    how: RunOptions,
) -> Report:
    """Write the model that `merged` was before the adapters came.

    Raises VerificationError where the base's bytes do not come back, MatchError where the undo file
    names other adapters, or where without one a replaced tensor cannot be brought back.
    """
    model = open_model(merged)
    opened = open_adapters(adapters, model)
    plan = (
        plan_exact(model, opened, UndoFile(options.undo))
        if options.undo
        else plan_rounded(model, opened, options)
    )
    return run(plan, output, how) if output else rehearse(plan, how)


def plan_exact(model: Model, adapters: Sequence[tuple[Adapter, float]], undo: UndoFile) -> Plan:
    """The base's own files, from the merged ones and the undo file."""
    if "shards" not in undo.facts:
        raise FormatError(
            f"{undo.path}: was written for a graph, and {model.path} is a checkpoint."
        )
    check_adapters(adapters, undo)
    parts = combine([resolve(model, adapter, weight) for adapter, weight in adapters])
    resolved = settle(model, parts, undo.facts["tied"]).resolved
    changes: dict[str, Callable[[], Change]] = {n: t.change for n, t in resolved.targets.items()}
    base = Base(model.stored, undo)
    changes |= {n: partial(bias_change, of) for n, of in resolved.added.items()}
    edits = tuple(Rebuild(model, undo, base, changes).edits())
    files: dict[str, bytes | Path] = dict(model.files)
    files |= {name: text.encode() for name, text in undo.facts["files"].items()}
    return Plan(
        "unmerge", _inputs(model, adapters, undo.path), _settings(adapters), edits, files,
        lambda results: {
            "tensors": len(results), "restored": sum(r.metrics["restored"] for r in results),
        },
        shards=tuple(base.shards),
        notes=("every restored tensor has the base's hash.",),
    )  # fmt: skip


def plan_rounded(
    model: Model, adapters: Sequence[tuple[Adapter, float]], options: UnmergeOptions
) -> Plan:
    """W' - B A, rounded once more."""
    negated = [(adapter, -weight) for adapter, weight in adapters]
    work = lay_upon(model, _without_wholes(negated, options), _as_merge(options))
    edits = tuple(work.edits())
    recorded = _recorded(model)
    return Plan(
        "unmerge", _inputs(model, adapters, None), _settings(adapters), edits, work.files(),
        lambda results: _distance(results, recorded),
        notes=(*work.notes, *_notes(work)),
    )  # fmt: skip


def _as_merge(options: UnmergeOptions) -> MergeOptions:
    return MergeOptions(tied=options.tied)


def _without_wholes(
    adapters: Sequence[tuple[Adapter, float]], options: UnmergeOptions
) -> list[tuple[Adapter, float]]:
    """What can be subtracted; replaced and rescaled tensors are lost, and stay only if that is allowed."""
    where = ", ".join(str(adapter.path) for adapter, _ in adapters)
    problems = [*lost_parts(adapters), *(p for adapter, _ in adapters for p in adapter.problems)]
    refuse(where, problems, options.allowed)
    return [(replace(a, problems=()), w) for a, w in subtractable(adapters)]


def lost_parts(adapters: Sequence[tuple[Adapter, float]]) -> list[Problem]:
    """What cannot be brought back by subtraction."""
    lost = [
        Problem(name, f"{name} was replaced as a whole: only the undo file brings back the base's")
        for adapter, _ in adapters
        for name in adapter.replaced
    ]
    lost += [
        Problem(
            f"{site.module}.{site.parameter}",
            f"{site.module}.{site.parameter}: what {site.config.variant} adds depends on the weight: "
            "only the undo file brings back the base's",
        )
        for adapter, _ in adapters
        for site in adapter.sites
        if not _subtracted(site)
    ]
    return lost


def subtractable(adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float]]:
    """The adapters without what is lost."""
    return [
        (replace(adapter, sites=tuple(filter(_subtracted, adapter.sites)), replaced={}), weight)
        for adapter, weight in adapters
    ]


def _subtracted(site: Site) -> bool:
    variant = cast(Variant, plugins.load("adapters", site.config.variant))
    return variant.LINEAR_IN_W


def check_adapters(adapters: Sequence[tuple[Adapter, float]], undo: UndoFile) -> None:
    """Raise MatchError unless these are what was merged."""
    keys = ("digest", "weight")
    got = [[fact[k] for k in keys] for fact in adapter_facts(adapters)]
    want = [[fact[k] for k in keys] for fact in undo.facts["adapters"]]
    if got != want:
        merged = ", ".join(f"{f['path']}:{f['weight']:g}" for f in undo.facts["adapters"])
        named = ", ".join(f"{adapter.path}:{weight:g}" for adapter, weight in adapters)
        raise MatchError(
            f"{undo.path}: was written when {merged} was merged, but {named} is not that. Name the "
            "same adapters, in the same order, with the same weights."
        )


def _recorded(model: Model) -> Mapping[str, Any]:
    """What the merge said of each tensor: the base's hash, and the noise of its rounding."""
    path = model.path / MANIFEST
    if not path.is_file():
        return {}
    content = json.loads(path.read_bytes())
    tensors: Mapping[str, Any] = content.get("tensors", {})
    return tensors if content.get("operation") == "merge" else {}


def _distance(results: Sequence[Result], recorded: Mapping[str, Any]) -> dict[str, float]:
    """How far it is from the base: tensors with the base's hash, and the error expected of the others."""
    subtracted, merged = total(results), Sums()
    exact = 0
    for result in results:
        before = recorded.get(result.name, {})
        exact += before.get("read", {}).get(result.name) == result.written.get(result.name, "")
        # a merge that left no record rounded as often as the subtraction did
        noise2 = before.get("metrics", {}).get("noise2", result.metrics.get("noise2", 0.0))
        merged.add(0.0, 0.0, noise2)
    noise2 = subtracted.noise2 + merged.noise2
    error = math.sqrt(noise2 / subtracted.power) if subtracted.power else 0.0
    return {"tensors": len(results), "exact": exact, "expected_error": error}


def _notes(work: Work) -> tuple[str, ...]:
    notes = ["without --undo the base comes back to rounding: see the expected error."]
    if work.model.weights.packed:
        notes.append("the merged model is quantized: what comes back is 16-bit, and not the base.")
    return tuple(notes)


def _inputs(
    model: Model, adapters: Sequence[tuple[Adapter, float]], undo: Path | None
) -> dict[str, Path]:
    inputs = {"merged": model.path}
    inputs |= {f"adapter {i}": adapter.path for i, (adapter, _) in enumerate(adapters, 1)}
    return inputs | ({"undo": undo} if undo else {})


def _settings(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, object]:
    return {"adapters": [f"{adapter.path}:{weight:g}" for adapter, weight in adapters]}
