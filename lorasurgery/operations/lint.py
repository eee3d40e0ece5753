"""lint: what a runtime would make of an adapter, feature by feature, before anybody serves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasurgery.adapter import Adapter
from lorasurgery.errors import UnknownNameError, VerificationError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations.runtimes.claims import RUNTIMES, Claim, Runtime, Verdict
from lorasurgery.operations.runtimes.features import Feature, features
from lorasurgery.plugins import suggestion


@dataclass(frozen=True, slots=True)
class Row:
    """One feature that the adapter has: in which modules, and what becomes of it."""

    feature: str
    verdict: Verdict
    why: str
    source: str
    versions: str = ""
    where: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Lint:
    """All rows; plain LoRA matrices of one rank and alpha have none and are read by every runtime."""

    adapter: Path
    runtime: str
    rows: tuple[Row, ...]

    @property
    def bad(self) -> tuple[Row, ...]:
        """What is refused there, or goes wrong without a word."""
        return tuple(row for row in self.rows if row.verdict in ("rejected", "silent"))


def lint(adapter: Path, runtime: str, base: Path | None = None) -> Lint:
    """Headers alone are read. Raises UnknownNameError for a runtime that nobody has looked into."""
    known = runtime_of(runtime)
    opened = open_adapter(adapter)
    model = open_model(base) if base else None
    return Lint(adapter, runtime, tuple(_rows(opened, known, model)))


def runtime_of(name: str) -> Runtime:
    """The table's entry."""
    if name not in RUNTIMES:
        raise UnknownNameError(
            f"--for {name}: no such runtime is known. {suggestion(name, list(RUNTIMES))}"
        )
    return RUNTIMES[name]


def insist(found: Lint) -> None:
    """Raise VerificationError if anything is rejected or silently wrong."""
    if found.bad:
        wrong = ", ".join(f"{row.feature} ({row.verdict})" for row in found.bad)
        raise VerificationError(
            f"{found.adapter}: {found.runtime} does not compute what it was trained to: {wrong}. Convert "
            f"it: lorasurgery convert --for {found.runtime}."
        )


def _rows(adapter: Adapter, runtime: Runtime, model: Model | None) -> list[Row]:
    rows = []
    if adapter.dialect not in runtime.layouts:
        claim = runtime.claims.get("layout")
        reads = " or ".join(runtime.layouts)
        why = f"the layout is {adapter.dialect}, and {reads} is read"
        verdict: Verdict = claim.verdict if claim else "unknown"
        known = (claim.source, claim.versions) if claim else ("", "")
        rows.append(Row("layout", verdict, why, *known))
    # what the runtime's own layout says needs no converter that could lose it
    own = runtime.layouts[0] == adapter.dialect != "peft"
    claims = runtime.claims_on(model.config if model else adapter.base_config)
    rows += [_row(feature, claims, own=own) for feature in features(adapter, model)]
    most = max(runtime.ranks, default=0)
    high = tuple(s.module for s in adapter.sites if most and s.config.rank > most)
    if high:
        rows.append(_row(Feature("rank", high), runtime.claims, own=False))
    return rows


def _row(feature: Feature, claims: Mapping[str, Claim], *, own: bool) -> Row:
    claim = claims.get(feature.name)
    if own and feature.name in ("rsLoRA", "alpha_pattern", "rank_pattern", "embeddings"):
        return Row(feature.name, "ok", "its own layout says it", "", "", feature.where)
    if claim is None or (claim.by_scale and not feature.scales):
        why = (
            "nobody has looked"
            if claim is None
            else "the scales are alike; nobody has looked further"
        )
        return Row(feature.name, "unknown", why, "", "", feature.where)
    return Row(feature.name, claim.verdict, claim.why, claim.source, claim.versions, feature.where)
