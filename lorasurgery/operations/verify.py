"""Verify: is MERGED = BASE + the adapters' changes, and nothing else? Told from the files alone.

For each tensor with an intended change D: rho = <W' - W, D> / ||D||², noise = ||W' - W - D|| / ||D||, and what
of W' - W - rho D lies inside and outside the adapter's subspace.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from lorasurgery.errors import VerificationError
from lorasurgery.export._onnx_modules import open_modules
from lorasurgery.formats.onnx import File
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_laid import plain
from lorasurgery.operations.verifying.check import Finding, check
from lorasurgery.operations.verifying.expected import Expected, expect
from lorasurgery.operations.verifying.verdict import CODES
from lorasurgery.surgery import Progress

LEAST = 0.9  # of a change, where a merge into codes must keep it


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """`min_retained`: None asks 0.9 of a merge into codes, and of others that they are rounded once."""

    min_retained: float | None = None
    allow_unmatched: tuple[str, ...] = ()
    threads: int = 0  # 0: as many as there are processors for this process
    progress: Progress = lambda _done, _all, _name: None
    names: Mapping[str, str] = field(default_factory=dict)  # of an ONNX file: module -> node


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found, tensor by tensor and in total."""

    merged: Path
    base: Path
    adapters: tuple[str, ...]
    findings: tuple[Finding, ...]
    total: Mapping[str, float]
    min_retained: float | None
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if not f.holds)

    @property
    def lost(self) -> bool:
        """Less of the change is there than must be."""
        return self.min_retained is not None and self.total["retained"] < self.min_retained

    @property
    def holds(self) -> bool:
        return not self.wrong and not self.lost


def verify(
    merged: Path, base: Path, adapters: Sequence[str], options: VerifyOptions
) -> Verification:
    """Compare every tensor. Raises what opening the files raises; `insist` raises if it does not hold."""
    started = time.perf_counter()
    model = _open(base, options)
    opened = open_adapters(adapters, model)
    if base.suffix == ".onnx":
        opened = [(plain(adapter), weight) for adapter, weight in opened]
    expected = expect(model, _open(merged, options), opened, options.allow_unmatched)
    least = LEAST if options.min_retained is None else options.min_retained
    findings = _check_all(expected, least, options)
    codes = any(f.power and f.tensor in expected.merged.weights.packed for f in findings)
    enforced = least if codes or options.min_retained is not None else None
    total = _total(findings)
    notes = list(expected.notes)
    if enforced is None and total["retained"] < LEAST:
        notes.append(
            f"rounding kept {total['retained']:.3f} of the change. `lorasurgery merge` with --dtype "
            "float32 or --rounding stochastic keeps more."
        )
    notes += _weak(findings, least)
    return Verification(
        merged, base, tuple(adapters), findings, total, enforced,
        time.perf_counter() - started, tuple(notes),
    )  # fmt: skip


def _open(path: Path, options: VerifyOptions) -> Model:
    """An ONNX file is seen by its modules."""
    if path.suffix != ".onnx":
        return open_model(path)
    return open_modules(File(path), options.names)[0]


def insist(found: Verification) -> None:
    """Raise VerificationError if it does not hold: the first tensor, and how many more."""
    if found.wrong:
        first, more = found.wrong[0], len(found.wrong) - 1
        others = f", and {more} more do not hold" if more else ""
        raise VerificationError(
            f"{found.merged}: {first.tensor}: {first.cause}{others}. Merge again from the base."
        )
    if found.lost:
        raise VerificationError(
            f"{found.merged}: {found.total['retained']:.3f} of the change is in it, less than "
            f"--min-retained {found.min_retained:g}: it was lost in rounding, or never merged. Merge in "
            "another way: to float32, or with another --requantize policy."
        )


def _weak(findings: Sequence[Finding], least: float) -> list[str]:
    """What rounding to the nearest codes explains, and cannot be told from no merge at all."""
    kept = {f.tensor: f.rho for f in findings if f.rounding == CODES and f.rho is not None}
    weak = {tensor: rho for tensor, rho in kept.items() if rho < least}
    if not weak:
        return []
    worst = min(weak, key=weak.__getitem__)
    return [
        f"less than {least:g} of the change is in {len(weak)} quantized tensors, {weak[worst]:.3f} in "
        f"{worst}: lost in rounding, or never merged."
    ]


def _check_all(expected: Expected, least: float, options: VerifyOptions) -> tuple[Finding, ...]:
    """Every tensor of either model, the largest first, by a few threads."""
    before, after = expected.base.weights, expected.merged.weights
    names = [*after, *(n for n in before if n not in after)]
    sizes = {n: (after if n in after else before).info(n).nbytes for n in names}
    total, done, lock = sum(sizes.values()), 0, Lock()

    def one(name: str) -> Finding:
        nonlocal done
        finding = check(expected, name, least)
        with lock:
            done += sizes[name]
            options.progress(done, total, name)
        return finding

    with ThreadPoolExecutor(options.threads or len(os.sched_getaffinity(0))) as pool:
        order = sorted(names, key=lambda n: -sizes[n])
        found = dict(zip(order, pool.map(one, order), strict=True))
    return tuple(found[name] for name in names)


def _total(findings: Sequence[Finding]) -> dict[str, float]:
    """Over all tensors with an intended change, each weighed by its size."""
    power = sum(f.power for f in findings)
    signal, noise2 = sum(f.signal for f in findings), sum(f.noise2 for f in findings)
    return {
        "tensors": len(findings),
        "changed": sum(f.role not in ("untouched", "tied", "missing", "extra") for f in findings),
        "retained": signal / power if power else 1.0,
        "noise": math.sqrt(noise2 / power) if power else 0.0,
        "wrong": sum(not f.holds for f in findings),
    }
