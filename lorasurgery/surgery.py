"""The engine: a plan of edits, each of one logical weight, streamed by a few threads.

Everything is planned before the first byte is written. An edit reads tiles, appends tiles, and
returns its metrics; the engine holds threads, hashes, progress, resume, report and commit.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import blake3

from lorasurgery import __version__
from lorasurgery.arrays import Array, as_bytes
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.errors import ShapeError
from lorasurgery.formats._writer import Shard, lay_out
from lorasurgery.output import Output, OutputOptions, check_place
from lorasurgery.tensors import TensorInfo

Metrics = Mapping[str, float]
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the edit that ended

TILE_BYTES = 1 << 20  # fits in a core's second-level cache, beside what is made of it
MANIFEST = "surgery.json"


@dataclass(frozen=True, slots=True)
class Edit:
    """One logical weight: what will be written for it, and the function that streams it.

    `apply` reads through its step, appends to `targets`, and returns the numbers of the report;
    an edit without metrics is a plain copy.
    """

    name: str
    targets: tuple[TensorInfo, ...]
    apply: Callable[[Step], Metrics]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one edit; digests are blake3 of the bytes read and written."""

    name: str
    metrics: Metrics
    read: Mapping[str, str]
    written: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Report:
    """What a finished (or only rehearsed) operation did."""

    operation: str
    results: tuple[Result, ...]  # edits with metrics, in plan order
    seconds: float
    total: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """All that an operation will do, complete before it begins.

    `files` are the side files of the output: contents, or a file to copy. `summarize` turns the
    results into totals. `check` raises to stop the commit. `finish` may write beside the output.
    """

    operation: str
    inputs: Mapping[str, Path]
    settings: Mapping[str, object]
    edits: tuple[Edit, ...]
    files: Mapping[str, bytes | Path]
    summarize: Callable[[tuple[Result, ...]], Mapping[str, float]]
    check: Callable[[Report], None] = lambda _: None
    finish: Callable[[Report, Path], None] = lambda _report, _partial: None
    shards: tuple[Shard, ...] | None = None  # an exact layout; None: laid out by size
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a plan, whatever it is."""

    output: OutputOptions = field(default_factory=OutputOptions)
    max_memory: int | None = None
    threads: int = 0  # 0: as many as there are processors for this process
    progress: Progress = lambda _done, _all, _name: None

    @property
    def workers(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def tile_bytes(self) -> int:
        """A tile and what is made of it, in float32 at worst, for each worker."""
        if self.max_memory is None:
            return TILE_BYTES
        return max(64 << 10, min(TILE_BYTES, self.max_memory // (8 * self.workers)))


class Sink(Protocol):
    """Where a step's bytes go."""

    partial: Path

    def write(self, name: str, offset: int, data: Array) -> None: ...
    def copy(self, name: str, source: Path, at: int) -> None: ...


class Step:
    """One edit while it runs: hashes what it reads and writes, and keeps its targets' ends."""

    def __init__(
        self, edit: Edit, sink: Sink | None, tile_bytes: int, stop: threading.Event
    ) -> None:
        self.tile_bytes, self._sink, self._stop = tile_bytes, sink, stop
        self._targets = {info.name: info for info in edit.targets}
        self._reached = dict.fromkeys(self._targets, 0)
        self._read: dict[str, Any] = {}
        self._written: dict[str, Any] = {}
        self.read: dict[str, str] = {}

    @property
    def scratch(self) -> Path | None:
        """The directory being written, for what is kept beside the tensors; None in a rehearsal."""
        return self._sink.partial if self._sink else None

    def tiles(
        self, source: Checkpoint, name: str, multiple: int = 1
    ) -> Iterator[tuple[int, Array]]:
        """(first row, rows) over a tensor; a tile's elements are a multiple of `multiple`."""
        info = source.info(name)
        rows = info.shape[0] if info.shape else 1
        step = tile_rows(info, multiple, self.tile_bytes)
        digest = None if name in self.read else blake3.blake3()
        for start in range(0, rows, step):
            if self._stop.is_set():
                raise Stopped
            tile = source.read(name, start, start + step)
            if digest is not None:
                digest.update(as_bytes(tile))
            yield start, tile
        source.release(name)
        if digest is not None:
            self.read[name] = f"blake3:{digest.hexdigest()}"

    def whole(self, source: Checkpoint, name: str) -> Array:
        """A small tensor at once."""
        data = source.read(name)
        self.read[name] = f"blake3:{blake3.blake3(as_bytes(data)).hexdigest()}"
        return data

    def append(self, name: str, data: Array) -> None:
        """The next bytes of a target."""
        raw = as_bytes(data)
        reached = self._reached[name]
        if reached + raw.nbytes > self._targets[name].nbytes:
            raise ShapeError(
                f"{self._targets[name]}: {reached + raw.nbytes} bytes are written. This is a bug."
            )
        self._written.setdefault(name, blake3.blake3()).update(raw)
        if self._sink:
            self._sink.write(name, reached, raw)
        self._reached[name] = reached + raw.nbytes

    def copy(self, name: str, source: Checkpoint, old: str | None = None) -> None:
        """A target that is byte for byte a source's tensor."""
        old = old or name
        place = source.place(old)
        if place is None:
            for _, tile in self.tiles(source, old):
                self.append(name, tile)
            return
        if self._sink:
            self._sink.copy(name, *place)
        self._reached[name] = self._targets[name].nbytes

    def finish(self) -> dict[str, str]:
        """Digests of the appended targets, all of which must be full."""
        for name, info in self._targets.items():
            if self._reached[name] != info.nbytes:
                raise ShapeError(f"{info}: {self._reached[name]} bytes are written. This is a bug.")
        return {name: f"blake3:{d.hexdigest()}" for name, d in self._written.items()}


class Stopped(Exception):
    """Another thread failed; this one ends too."""


def tile_rows(info: TensorInfo, multiple: int, tile_bytes: int) -> int:
    """Rows of one tile: about tile_bytes, and elements that divide by `multiple` if rows allow."""
    from math import gcd

    if not info.shape:
        return 1
    row = max(1, info.numel // max(1, info.shape[0]))
    unit = multiple // gcd(row, multiple)
    row_bytes = max(1, info.nbytes // max(1, info.shape[0]))
    return max(unit, tile_bytes // row_bytes // unit * unit)


def copy_edit(source: Checkpoint, name: str) -> Edit:
    """The edit that changes nothing."""

    def apply(step: Step) -> Metrics:
        step.copy(name, source)
        return {}

    return Edit(name, (source.info(name),), apply)


def run(plan: Plan, path: Path, options: RunOptions) -> Report:
    """Carry out a plan and make `path` its result, or raise and leave `path` as it was."""
    infos = [info for edit in plan.edits for info in edit.targets]
    shards = plan.shards or lay_out(infos, options.output.max_shard, {"format": "pt"})
    check_place(path, plan.inputs.values(), options.output, sum(s.size for s in shards))
    plan_id = _identity(plan)
    if options.output.resume and (done := _finished(path, plan_id)):
        return done
    started = time.perf_counter()
    output = Output(path, shards, plan_id, options.output)
    try:
        results = _stream(plan, output, options)
        report = _report(plan, results, started)
        plan.check(report)
        plan.finish(report, output.partial)
        manifest = _manifest(plan, plan_id, report)
        output.commit({**plan.files, MANIFEST: manifest})
    except BaseException:
        output.abandon()
        raise
    return report


def rehearse(plan: Plan, options: RunOptions) -> Report:
    """Compute everything and write nothing: the numbers of `run`, before it."""
    started = time.perf_counter()
    return _report(plan, _stream(plan, None, options), started)


def _stream(plan: Plan, output: Output | None, options: RunOptions) -> tuple[Result, ...]:
    """Run the edits that are not done yet, the largest first, and collect all results."""
    sizes = {edit.name: sum(info.nbytes for info in edit.targets) for edit in plan.edits}
    total, finished = sum(sizes.values()), 0
    results: dict[str, Result] = {}
    lock, stop = threading.Lock(), threading.Event()
    for name, entry in (output.done if output else {}).items():
        results[name] = Result(name, entry["metrics"], entry["read"], entry["written"])
        finished += sizes[name]

    def work(edit: Edit) -> None:
        nonlocal finished
        if stop.is_set():
            return
        step = Step(edit, output, options.tile_bytes, stop)
        with suppress(Stopped):
            metrics = edit.apply(step)
            result = Result(edit.name, metrics, step.read, step.finish())
            if output:
                entry = {"metrics": dict(metrics), "read": result.read, "written": result.written}
                output.record(edit.name, entry, [info.name for info in edit.targets])
            with lock:
                results[edit.name] = result
                finished += sizes[edit.name]
                options.progress(finished, total, edit.name)

    todo = [edit for edit in plan.edits if edit.name not in results]
    large = total // (4 * options.workers)
    todo.sort(key=lambda edit: -sizes[edit.name] if sizes[edit.name] > large else 0)
    _in_threads(todo, work, options.workers, stop)
    ordered = (results[edit.name] for edit in plan.edits)
    return tuple(result for result in ordered if result.metrics)


def _in_threads(
    edits: list[Edit], work: Callable[[Edit], None], workers: int, stop: threading.Event
) -> None:
    """Run them all; the first failure, or Ctrl-C, stops the others at their next tile."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, edit) for edit in edits]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set() if any(not f.done() or f.exception() for f in futures) else None
        for future in done:
            future.result()


def _report(plan: Plan, results: tuple[Result, ...], started: float) -> Report:
    seconds = time.perf_counter() - started
    return Report(plan.operation, results, seconds, plan.summarize(results), plan.notes)


def _identity(plan: Plan) -> str:
    """Names a plan: the same command on the same inputs has the same identity."""
    facts = {
        "version": __version__,
        "operation": plan.operation,
        "settings": {k: str(v) for k, v in plan.settings.items()},
        "inputs": {role: _stamp(path) for role, path in plan.inputs.items()},
        "targets": [str(info) for edit in plan.edits for info in edit.targets],
    }
    return blake3.blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> list[object]:
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stats = [(file.name, file.stat()) for file in files]
    return [str(path.resolve()), *([n, s.st_size, s.st_mtime_ns] for n, s in stats)]


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest over many tensors, whatever their order."""
    lines = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return f"blake3:{blake3.blake3(lines.encode()).hexdigest()}"


def _manifest(plan: Plan, plan_id: str, report: Report) -> bytes:
    manifest = {
        "lorasurgery": __version__,
        "operation": plan.operation,
        "plan": plan_id,
        "settings": {k: v if _plain(v) else str(v) for k, v in plan.settings.items()},
        "inputs": {role: str(path) for role, path in plan.inputs.items()},
        "base_fingerprint": fingerprint({k: v for r in report.results for k, v in r.read.items()}),
        "seconds": round(report.seconds, 3),
        "total": dict(report.total),
        "notes": list(report.notes),
        "tensors": {
            r.name: {"metrics": dict(r.metrics), "read": r.read, "written": r.written}
            for r in report.results
        },
    }
    return json.dumps(manifest, indent=1).encode() + b"\n"


def _plain(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool, list, tuple))


def _finished(path: Path, plan_id: str) -> Report | None:
    """The report of an output that this very plan has completed before."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["plan"] == plan_id:
            results = tuple(
                Result(name, t["metrics"], t["read"], t["written"])
                for name, t in manifest["tensors"].items()
            )
            seconds, total = manifest["seconds"], manifest["total"]
            return Report(manifest["operation"], results, seconds, total, tuple(manifest["notes"]))
    return None
