"""Train an adapter on a frozen base: OUT.partial holds metrics and states while it runs, OUT the adapter."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import blake3

from lorasurgery import __version__, plugins
from lorasurgery.adapter import Dialect
from lorasurgery.checkpoint import MANIFEST, SCRATCH
from lorasurgery.errors import LoraSurgeryError
from lorasurgery.operations.algebra.adapter_output import (
    Outcome,
    as_written,
    check_variants,
    layout_for,
    manifest_of,
)
from lorasurgery.output import Output
from lorasurgery.place import check_apart, check_free, check_room, recover, writing
from lorasurgery.report import Report, Result, read_manifest
from lorasurgery.surgery import RunOptions, stamp
from lorasurgery.training import saved, setup, state, written
from lorasurgery.training.board import board
from lorasurgery.training.disk import OnDisk
from lorasurgery.training.interrupt import Interrupt
from lorasurgery.training.method import Group
from lorasurgery.training.options import TrainOptions
from lorasurgery.training.ranks import Ranks, joined
from lorasurgery.training.records import files
from lorasurgery.training.setup import Prepared
from lorasurgery.training.written import OnBase

METRICS = "metrics.jsonl"
STATE = Path(SCRATCH) / "state.pt"


@dataclass(frozen=True, slots=True)
class Trained:
    """The report, and what the optimizer was given."""

    report: Report
    groups: tuple[Group, ...] = ()


def train(base: Path, output: Path | None, options: TrainOptions, how: RunOptions) -> Trained:
    """Without an output, everything is prepared and counted, and no step is made.

    Raises OutputError, FormatError, MatchError, UsageError; ValueRangeError for a loss that is no number:
    then OUT.partial keeps the last state that was saved.
    """
    with joined(options.machine.device) as ranks:
        return _train(base, output, options, how, ranks)


def _train(
    base: Path, output: Path | None, options: TrainOptions, how: RunOptions, ranks: Ranks
) -> Trained:
    started = time.perf_counter()
    if options.dialect:
        plugins.load("dialects", options.dialect)  # not found, it would be so after all steps
    inputs = {"base": base, **{f"data{i}": p for i, p in enumerate(_files(options))}}
    if chosen := getattr(options.own, "keep", None):  # another choice of modules is another run
        inputs["keep"] = Path(chosen)
    plan = _identity(inputs, options)
    if output is not None:
        check_apart(output, inputs.values())
        if done := ranks.share(_begun(output, plan, how) if ranks.first else None):
            return Trained(done)
    prepared = setup.prepare(base, options, ranks)
    detours = prepared.trainer.parts.detours
    counts = setup.describe(detours, prepared.groups)
    if options.machine.report_memory:
        counts |= saved.report(prepared.trainer)
    where = str(next(prepared.trainer.parts.model.parameters()).device)
    report = Report("train", (), 0.0, counts, device=where)
    if output is not None:
        run = _Run(base, inputs, options, prepared, plan, started)
        made = Output(output, (), plan, how.output) if ranks.first else None
        report = run.into(made, report) if made else run.beside(report)
    return Trained(replace(report, seconds=time.perf_counter() - started), prepared.groups)


def _begun(output: Path, plan: str, how: RunOptions) -> Report | None:
    """What an earlier call of this run reported, if it came to its end; else there is room for it."""
    with writing(output, "the output"):
        recover(output)
    if how.output.resume and (done := read_manifest(output, plan)):
        return done
    check_free(output, overwrite=how.output.overwrite)
    check_room(output, 0)
    return None


def _files(options: TrainOptions) -> list[Path]:
    held = [path for text in options.held.data for path in files(text, "--eval-data")]
    return [*(path for text in options.data for path in files(text)), *held]


def _identity(inputs: Mapping[str, Path], options: TrainOptions) -> str:
    facts = {
        "version": __version__,
        "settings": options.settings,
        "inputs": {role: stamp(path) for role, path in inputs.items()},
    }
    return blake3.blake3(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(slots=True)
class _Run:
    """One run while it is made."""

    base: Path
    inputs: Mapping[str, Path]
    options: TrainOptions
    prepared: Prepared
    plan: str
    started: float

    def into(self, output: Output, report: Report) -> Report:
        """Train and write; what was saved stays if it fails."""
        saved = output.partial / STATE
        try:
            path = output.partial / METRICS
            with (
                writing(path, "the metrics"),
                path.open("ab") as metrics,
                board(output.partial) as shown,
            ):
                self._steps(OnDisk(metrics, saved, shown))
            return self._write(output, self._ended(report))
        except BaseException as error:
            if saved.exists():
                output.leave()
                if isinstance(error, LoraSurgeryError):
                    raise type(error)(f"{error} {self._left(output, saved)}") from error
            else:
                output.abandon()
            raise

    def beside(self, report: Report) -> Report:
        """A process that does not write takes its part of every step."""
        self._steps(None)
        return self._ended(report)

    def _ended(self, report: Report) -> Report:
        trainer = self.prepared.trainer
        trainer.take_best()
        trainer.parts.hooks.finish()
        total, notes = {**report.total, **self._figures()}, tuple(trainer.parts.hooks.notes())
        return replace(report, total=total, results=self._told(), notes=(*report.notes, *notes))

    def _left(self, output: Output, saved: Path) -> str:
        kept = state.load(saved).step
        return f"{output.partial} keeps the state after step {kept}."

    def _steps(self, disk: OnDisk | None) -> None:
        trainer, recipe = self.prepared.trainer, self.prepared.trainer.recipe
        ranks = trainer.parts.ranks
        if begun := ranks.share(disk.begun() if disk else None):
            trainer.restore(begun)
        if disk:
            disk.cut(trainer.metrics)
        with Interrupt() as stop:
            while not trainer.over:
                began = time.perf_counter()
                told: dict[str, Any] = trainer.step()
                due = trainer.due(recipe.evaluate_every)
                if self.prepared.held_out and due:
                    told["eval_loss"] = trainer.evaluate(self.prepared.held_out)
                    trainer.judge(told["eval_loss"])
                told["seconds"] = round(time.perf_counter() - began, 4)
                if disk:
                    trainer.metrics = disk.note(told)
                    self.options.watch(told, recipe.steps)
                (stopped,) = ranks.sums(stop.wanted)
                if stopped or trainer.due(recipe.save_every):
                    captured = trainer.capture()  # with what the other processes have
                    if disk:
                        disk.save(captured)
                if stopped:
                    raise KeyboardInterrupt

    def _figures(self) -> dict[str, float]:
        trainer = self.prepared.trainer
        found: dict[str, float] = {"steps": trainer.step_done, "tokens": trainer.tokens}
        if trainer.losses:
            found["loss"] = sum(trainer.losses) / len(trainer.losses)
        if trainer.best is not None:
            found |= {"eval_loss": trainer.best.loss, "best_step": trainer.best.step}
        return found

    def _told(self) -> tuple[Result, ...]:
        parts = self.prepared.trainer.parts
        norms, more = written.norms(parts.detours), parts.hooks.by_module()
        found = {
            path: {**({"change_norm": norms[path]} if path in norms else {}), **more.get(path, {})}
            for path in parts.detours.layers
        }
        return tuple(Result(path, figures, {}, {}) for path, figures in found.items() if figures)

    def _adapter(
        self, output: Output, figures: Mapping[str, Mapping[str, float]]
    ) -> tuple[OnBase, Dialect]:
        detours, options = self.prepared.trainer.parts.detours, self.options
        made = written.adapter(detours, options.name, output.path, self.prepared.settings)
        fitted = written.on_base(self.base, made, figures)
        name = options.dialect or layout_for(fitted.adapter)
        dialect = cast(Dialect, plugins.load("dialects", name))
        made = as_written(fitted.adapter, name, "F32")
        check_variants(made, name, dialect)
        return replace(fitted, adapter=made), dialect

    def _write(self, output: Output, report: Report) -> Report:
        figures = {result.name: result.metrics for result in report.results}
        fitted, dialect = self._adapter(output, figures)
        adapter, read = fitted.adapter, fitted.results
        with writing(output.partial, "the adapter"):
            dialect.write(adapter, output.partial)
            self.prepared.trainer.parts.hooks.beside(output.partial, fitted.names)
        report = replace(report, seconds=time.perf_counter() - self.started)
        outcome = Outcome("train", adapter, self.inputs, self.options.settings, read, report.total)
        content = manifest_of(outcome, adapter, replace(report, results=read), self.plan)
        output.commit({MANIFEST: content})
        return replace(report, results=tuple(result for result in read if result.metrics))
