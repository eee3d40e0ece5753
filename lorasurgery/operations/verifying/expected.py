"""What a merged model should hold: for each of its tensors where it comes from, and its change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorasurgery import targets
from lorasurgery.adapter import Adapter
from lorasurgery.change import Change
from lorasurgery.model import Model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations._right_base import check_base
from lorasurgery.operations.verifying.compare import differing_whole
from lorasurgery.problems import refuse
from lorasurgery.target import Share, Target
from lorasurgery.targets import Resolved, Whole
from lorasurgery.tied import settle, tied_pair

# where a merge into NF4 leaves the small adapter of what its rounding lost
RESIDUAL = "residual_adapter"


@dataclass(frozen=True, slots=True)
class Expected:
    """The base as `merged` should have changed it. All names are those of merged tensors."""

    base: Model
    merged: Model
    changed: Mapping[str, Target]
    replaced: Mapping[str, Whole]
    added: Mapping[str, tuple[Whole, ...]]
    origin: Mapping[str, str]  # an untied head -> the base's embedding
    residual: Mapping[str, Target]  # what is served beside the merged weights
    adapters: tuple[Adapter, ...]
    notes: tuple[str, ...]

    @property
    def settings(self) -> list[Mapping[str, Any]]:
        """The adapters' configs, as they stand."""
        return [adapter.settings for adapter in self.adapters]

    def owner(self, share: Share) -> str:
        """The adapter that a share is of."""
        found = (a for a in self.adapters if any(site is share.site for site in a.sites))
        return str(next(found).path)

    def source(self, name: str) -> str | None:
        """The base's tensor that this one was, or None if it had none."""
        old = self.origin.get(name, name)
        return old if old in self.base.weights else None

    def change(self, name: str) -> Change | None:
        """All that adapters should have done to a tensor but replace it; None for nothing."""
        target, wholes = self.changed.get(name), self.added.get(name)
        if wholes:
            return targets.bias_change(wholes)
        read = partial(self.base.weights.read, self.source(name) or name)
        return target.change(read) if target else None

    def scale(self, name: str) -> float:
        """The largest factor that a product B A of this tensor is multiplied by; 1 for none."""
        shares = self.changed[name].shares if name in self.changed else ()
        return max((abs(s.weight * s.site.config.scaling) for s in shares), default=1.0)


def expect(
    base: Model,
    merged: Model,
    adapters: Sequence[tuple[Adapter, float]],
    allowed: Sequence[str],
) -> Expected:
    """Lay the adapters upon the base, heads tied or not as the merged model has them.

    Raises MatchError for parts of an adapter that have no place in the base, unless allowed.
    """
    parts = [targets.resolve(base, adapter, weight) for adapter, weight in adapters]
    pair = tied_pair(base)
    untied = pair is not None and pair[0] in merged.weights
    settled = settle(base, targets.combine(parts), "untie" if untied else "shared")
    resolved = settled.resolved
    where = ", ".join(str(adapter.path) for adapter, _ in adapters)
    problems = [*resolved.problems, *targets.unmatched(base, resolved)]
    left = refuse(where, problems, allowed)
    check_base(base, resolved)
    notes = [f"left out: {problem.message}." for problem in left]
    residual = _residual(merged)
    if residual:
        notes.append(f"counted in: {merged.path / RESIDUAL}, which is served beside the weights.")
    origin = {pair[0]: pair[1]} if pair and untied else {}
    replaced = {n: w for n, w in resolved.replaced.items() if not _brought(base, resolved, n)}
    return Expected(
        base, merged, resolved.targets, replaced, resolved.added, origin, residual,
        tuple(adapter for adapter, _ in adapters), (*settled.notes, *notes),
    )  # fmt: skip


def _brought(base: Model, resolved: Resolved, name: str) -> bool:
    """Whether a replacement is but the base's own tensor, brought along beside what adapts it."""
    adapted = name in resolved.targets or name in resolved.added
    if not adapted or name not in base.weights:
        return False
    whole = resolved.replaced[name]
    same = whole.info.shape == base.weights.info(name).shape
    return same and not differing_whole(whole, base.weights, name)


def _residual(merged: Model) -> Mapping[str, Target]:
    folder: Path = merged.path / RESIDUAL
    if not folder.is_dir():
        return {}
    resolved = targets.resolve(merged, open_adapter(folder))
    refuse(folder, [*resolved.problems, *targets.unmatched(merged, resolved)], ())
    return resolved.targets
