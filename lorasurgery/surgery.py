"""The engine: a plan of edits, each of one logical weight, streamed by a few threads.

Everything is planned before the first byte is written. An edit reads tiles, appends tiles, and
returns its metrics; the engine holds threads, hashes, progress, resume, report and commit.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import blake3

from lorasurgery import __version__
from lorasurgery.checkpoint import MANIFEST
from lorasurgery.device import HOST, Device
from lorasurgery.edit import Edit, Metrics, Step, Stopped, copy_edit, tile_rows
from lorasurgery.errors import FormatError, OutputError
from lorasurgery.formats._writer import Layout, lay_out
from lorasurgery.output import Output, OutputOptions, intact
from lorasurgery.place import FULL, check_apart, check_free, check_room, recover, writing
from lorasurgery.report import Report, Result, fingerprint, manifest, read_manifest

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the edit that ended

TILE_BYTES = HOST.tile_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """All that an operation will do, complete before it begins.

    `files` are the side files of the output: contents, or a file to copy. `summarize` turns the
    results into totals. `check` raises to stop the commit. `finish` may write into the output's
    directory, and beside it under another name; `publish` gives that its name once the output is
    complete, or `discard` removes it. A run that is resumed does these again.
    """

    operation: str
    inputs: Mapping[str, Path]
    settings: Mapping[str, object]
    edits: tuple[Edit, ...]
    files: Mapping[str, bytes | Path]
    summarize: Callable[[tuple[Result, ...]], Mapping[str, float]]
    check: Callable[[Report], None] = lambda _: None
    finish: Callable[[Report, Path], None] = lambda _report, _partial: None
    publish: Callable[[], None] = lambda: None
    discard: Callable[[], None] = lambda: None
    shards: tuple[Layout, ...] | None = None  # an exact layout; None: laid out by size
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a plan, whatever it is."""

    output: OutputOptions = field(default_factory=OutputOptions)
    max_memory: int | None = None
    threads: int = 0  # 0: as many as there are processors for this process
    progress: Progress = lambda _done, _all, _name: None
    device: Device = HOST  # what is written does not depend on it

    @property
    def workers(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))

    @property
    def tile_bytes(self) -> int:
        """A tile and what is made of it, in float32 at worst, for each worker."""
        most, bound = self.device.tile_bytes, self.max_memory
        return most if bound is None else max(64 << 10, min(most, bound // (8 * self.workers)))


def run(plan: Plan, path: Path, options: RunOptions) -> Report:
    """Carry out a plan and make `path` its result, or raise and leave `path` as it was."""
    infos = [info for edit in plan.edits for info in edit.targets]
    shards: tuple[Layout, ...] = plan.shards or lay_out(
        infos, options.output.max_shard, {"format": "pt"}
    )
    stamps = _stamps(plan)
    plan_id = _identity(plan, shards, stamps)
    check_apart(path, plan.inputs.values())
    with writing(path, "the output"):
        recover(path)
    if options.output.resume and (done := _finished(path, shards, plan_id)):
        plan.publish()
        return done
    check_free(path, overwrite=options.output.overwrite)
    check_room(path, sum(shard.size for shard in shards) + sum(map(_size, plan.files.values())))
    started = time.perf_counter()
    output = Output(path, shards, plan_id, options.output)
    try:
        results = _stream(plan, output, options)
        _check_unchanged(stamps, _stamps(plan))
        report = _report(plan, results, started, options)
        plan.check(report)
        plan.finish(report, output.partial)
        content = manifest(report, plan_id, plan.settings, plan.inputs)
        output.commit({**plan.files, MANIFEST: content})
        plan.publish()
    except BaseException:
        if output.abandon():
            plan.discard()
        raise
    return report


def _finished(path: Path, shards: tuple[Layout, ...], plan_id: str) -> Report | None:
    """The report of this very plan, where `path` is its result already."""
    if not all(intact(path, shard) for shard in shards):
        return None
    return read_manifest(path, plan_id)


def rehearse(plan: Plan, options: RunOptions) -> Report:
    """Compute everything and write nothing: the numbers of `run`, before it."""
    started = time.perf_counter()
    return _report(plan, _stream(plan, None, options), started, options)


def _stream(plan: Plan, output: Output | None, options: RunOptions) -> tuple[Result, ...]:
    """Run the edits that are not done yet, the largest first, and collect all results."""
    assert len({edit.name for edit in plan.edits}) == len(plan.edits), "an edit is planned twice"
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
        step = Step(edit, output, options.tile_bytes, stop, options.device)
        with suppress(Stopped):
            metrics = _apply(edit, step)
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


def _apply(edit: Edit, step: Step) -> Metrics:
    """The tensors' way out is named by the output; this is the way in, and what is kept beside."""
    try:
        return edit.apply(step)
    except OSError as error:
        if error.errno in FULL:
            raise OutputError(
                f"{edit.name}: what is kept of it for the end cannot be written "
                f"({error.strerror}). Make room, or name another output."
            ) from None
        where = error.filename or edit.name
        raise FormatError(
            f"{where}: cannot be read for {edit.name} ({error.strerror}). Check the file."
        ) from None


def _in_threads(
    edits: list[Edit], work: Callable[[Edit], None], workers: int, stop: threading.Event
) -> None:
    """Run them all; the first failure, or Ctrl-C, stops the others at their next tile."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, edit) for edit in edits]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            stop.set()
            raise


def _report(plan: Plan, results: tuple[Result, ...], started: float, options: RunOptions) -> Report:
    seconds, device = time.perf_counter() - started, options.device.name
    return Report(plan.operation, results, seconds, plan.summarize(results), plan.notes, device)


# a log that is written into the input changes nothing
_STAMPED = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".json")

_Stamps = dict[str, list[tuple[str, int, int]]]


def _stamps(plan: Plan) -> _Stamps:
    """Each input's files with their sizes and times."""
    return {role: stamp(path) for role, path in plan.inputs.items()}


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """An input's files with their sizes and times."""
    found = []
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file == path or file.suffix in _STAMPED:
            with suppress(FileNotFoundError):  # a broken link, or gone just now
                stat = file.stat()
                found.append((str(file.absolute()), stat.st_size, stat.st_mtime_ns))
    return found


def _check_unchanged(before: _Stamps, now: _Stamps) -> None:
    """Raise FormatError if an input is not what it was when the run began."""
    for role, files in before.items():
        if changed := set(files) ^ set(now[role]):
            raise FormatError(
                f"{min(changed)[0]}: changed while it was read. Leave it alone, and begin again."
            )


def _identity(plan: Plan, shards: tuple[Layout, ...], stamps: _Stamps) -> str:
    """Names a plan: the same command on the same inputs has the same identity."""
    facts = {
        "version": __version__,
        "operation": plan.operation,
        "settings": {k: str(v) for k, v in plan.settings.items()},
        "inputs": stamps,
        "edits": [edit.name for edit in plan.edits],
        "files": [(shard.file, blake3.blake3(shard.head).hexdigest()) for shard in shards],
    }
    return blake3.blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _size(content: bytes | Path) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


# an operation finds here all that a plan is made of
__all__ = [
    "MANIFEST", "Edit", "Metrics", "Plan", "Progress", "Report", "Result", "RunOptions", "Step",
    "Stopped", "copy_edit", "fingerprint", "rehearse", "run", "stamp", "tile_rows",
]  # fmt: skip
