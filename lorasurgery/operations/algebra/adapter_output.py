"""An adapter as an operation's result: written beside its name, made whole by a rename, with surgery.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import blake3

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Dialect
from lorasurgery.checkpoint import MANIFEST, weight_files
from lorasurgery.errors import FormatError, UsageError
from lorasurgery.operations.algebra.made import distinct, nbytes, parameters
from lorasurgery.output import Output
from lorasurgery.place import check_apart, check_free, check_room, recover, writing
from lorasurgery.report import Report, Result, manifest
from lorasurgery.surgery import RunOptions

_CONFIGS = ("adapter_config.json", "adapter.json")
_HEADERS = 1 << 20  # config, header, surgery.json


@dataclass(frozen=True, slots=True)
class AdapterFormat:
    """How factors are written: the layout (None: as the input was, if it can be), and a float dtype of BITS."""

    dialect: str | None = None
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that an operation has made of its inputs, before it is written."""

    operation: str
    adapter: Adapter
    inputs: Mapping[str, Path]
    settings: Mapping[str, object]
    results: tuple[Result, ...]
    total: Mapping[str, float]
    notes: tuple[str, ...] = ()
    started: float = field(default_factory=time.perf_counter)
    # what is written, by folder of the output, where it is more than the one adapter
    parts: Mapping[str, Adapter] = field(default_factory=dict)


def publish(outcome: Outcome, output: Path | None, form: AdapterFormat, how: RunOptions) -> Report:
    """Write the adapter to a directory that appears complete or not at all; no output: only the report.

    Raises OutputError where it cannot be written, FormatError for what the layout cannot say.
    """
    name = form.dialect or layout_for(outcome.adapter)
    dialect = cast(Dialect, plugins.load("dialects", name))
    parts = outcome.parts or {".": outcome.adapter}
    parts = {folder: as_written(part, name, form.dtype) for folder, part in parts.items()}
    for part in parts.values():
        check_variants(part, name, dialect)
    size = sum(map(_size, parts.values()))
    numbers = sum(parameters(distinct(part.sites)) for part in parts.values())
    total = {**outcome.total, "parameters": numbers, "bytes": size}
    report = Report(outcome.operation, outcome.results, 0.0, total, outcome.notes)
    if output is not None:
        _write(outcome, report, (parts, dialect, size), output, how)
    return replace(report, seconds=time.perf_counter() - outcome.started)


def _size(adapter: Adapter) -> int:
    return sum(map(nbytes, distinct(adapter.sites))) + sum(
        i.nbytes for i in adapter.replaced.values()
    )


def _write(
    outcome: Outcome,
    report: Report,
    made: tuple[Mapping[str, Adapter], Dialect, int],
    path: Path,
    how: RunOptions,
) -> None:
    parts, dialect, size = made
    check_apart(path, outcome.inputs.values())
    with writing(path, "the output"):
        recover(path)
    check_free(path, overwrite=how.output.overwrite)
    check_room(path, size + _HEADERS)
    output = Output(path, (), "", replace(how.output, resume=False))
    try:
        with writing(output.partial, "the adapter"):
            for folder, part in parts.items():
                (output.partial / folder).mkdir(exist_ok=True)
                dialect.write(part, output.partial / folder)
        seconds = time.perf_counter() - outcome.started
        content = manifest_of(outcome, outcome.adapter, replace(report, seconds=seconds))
        output.commit({MANIFEST: content})
    except BaseException:
        output.abandon()
        raise


def layout_for(adapter: Adapter) -> str:
    """The layout that the input had, or else the first that can hold these variants."""
    wanted = {site.config.variant for site in adapter.sites}
    names = [adapter.dialect, *plugins.names("dialects")]
    able = (n for n in names if wanted <= set(plugins.load("dialects", n).VARIANTS))
    return next(able, adapter.dialect)


def check_ready(output: Path | None, inputs: Mapping[str, Path], how: RunOptions) -> None:
    """Raise OutputError now for what would stop the writing after an hour of work."""
    if output is not None:
        check_apart(output, inputs.values())
        check_free(output, overwrite=how.output.overwrite)
        check_room(output, 0)


def as_written(adapter: Adapter, dialect: str, dtype: str) -> Adapter:
    """The dtype that each factor is written in; another layout's settings mean nothing in this one."""
    sites = tuple(
        replace(s, factors={k: replace(i, dtype=dtype) for k, i in s.factors.items()})
        for s in adapter.sites
    )
    same = dialect == adapter.dialect
    settings = adapter.settings if same else {"task_type": adapter.settings.get("task_type")}
    return replace(adapter, sites=sites, settings=settings)


def check_variants(adapter: Adapter, name: str, dialect: Dialect) -> None:
    """Raise what a layout cannot hold before anything is computed for it."""
    if not adapter.sites and not adapter.replaced:
        raise FormatError(f"{adapter.path}: nothing is left of it to write. Ask for less to go.")
    wanted = {site.config.variant for site in adapter.sites}
    if missing := wanted - set(dialect.VARIANTS):
        raise UsageError(
            f"--dialect {name}: cannot hold {', '.join(sorted(missing))}. It holds "
            f"{', '.join(sorted(dialect.VARIANTS))}."
        )


def manifest_of(outcome: Outcome, adapter: Adapter, report: Report, plan_id: str = "") -> bytes:
    """surgery.json: as of models, with the base that the adapter is for and the inputs' digests."""
    content: dict[str, Any] = json.loads(
        manifest(report, plan_id, outcome.settings, outcome.inputs)
    )
    content["base"] = adapter.base
    if not any(result.read for result in outcome.results):
        content["base_fingerprint"] = base_fingerprint(outcome.inputs)
    content["digests"] = {
        role: digest(path) for role, path in outcome.inputs.items() if _small(path)
    }
    return json.dumps(content, indent=1).encode() + b"\n"


def base_fingerprint(inputs: Mapping[str, Path]) -> str | None:
    """What the inputs' own surgery.json say of their base, where they say one thing."""
    found = set()
    for path in inputs.values():
        with suppress(OSError, ValueError, AttributeError):
            if said := json.loads((path / MANIFEST).read_bytes()).get("base_fingerprint"):
                found.add(str(said))
    return found.pop() if len(found) == 1 else None


def _small(path: Path) -> bool:
    """Whether an input is an adapter: models are too large to be read once more for a digest."""
    return path.is_file() or any((path / name).is_file() for name in _CONFIGS)


def digest(path: Path) -> str:
    """blake3 over an adapter's weight files, in their order."""
    hasher = blake3.blake3()
    for file in weight_files(path) if path.is_dir() else [path]:
        hasher.update_mmap(file)
    return f"blake3:{hasher.hexdigest()}"
