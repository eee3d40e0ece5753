"""How two adapters differ, or two checkpoints: module by module, tensor by tensor."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasurgery.adapter import Site
from lorasurgery.arrays import Array
from lorasurgery.edit import tile_rows
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import dialect_of, open_adapter
from lorasurgery.operations.algebra.factored import Factored, factored
from lorasurgery.operations.algebra.interference import inner, interference
from lorasurgery.operations.algebra.made import name_of, nbytes, side_by_side, usable
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.report import Report, Result
from lorasurgery.surgery import TILE_BYTES, RunOptions
from lorasurgery.tensors import BITS


def diff(
    a: Path, b: Path, allowed: tuple[str, ...], how: RunOptions, base: Path | None = None
) -> Report:
    """Two adapters or two checkpoints; `base` where an adapter's changes depend on it.

    Raises UsageError for one of each, MatchError for no common part.
    """
    kinds = [dialect_of(path) is not None for path in (a, b)]
    if kinds[0] != kinds[1]:
        one, other = (a, b) if kinds[0] else (b, a)
        raise UsageError(
            f"diff: {one} is an adapter, {other} is none. Compare two of a kind, or ask --inside."
        )
    if kinds[0]:
        model = open_model(base) if base else None
        old, new = (factored(open_adapter(path), model) for path in (a, b))
        return _adapters(old, new, allowed, how)
    if base:
        raise UsageError("diff: --base is for adapters whose changes depend on it. Take it away.")
    return _checkpoints(open_model(a), open_model(b), how)


def _adapters(one: Factored, other: Factored, allowed: tuple[str, ...], how: RunOptions) -> Report:
    started, a, b = time.perf_counter(), one.adapter, other.adapter
    notes = [*usable(a, allowed), *usable(b, allowed)]
    old, new = ({name_of(s): s for s in x.sites} for x in (a, b))
    names = [n for n in old if n in new]
    if not names:
        raise MatchError(
            f"{b.path}: adapts no module that {a.path} adapts. Check that they are for one base."
        )
    items = [(n, nbytes(old[n]) + nbytes(new[n]), n) for n in names]
    results = side_by_side(items, lambda n: _module((one, old[n]), (other, new[n])), how)
    notes += _alone(a.path, [n for n in old if n not in new])
    notes += _alone(b.path, [n for n in new if n not in old])
    total = {"modules": len(names), **_total(results)}
    seconds = time.perf_counter() - started
    return Report("diff", tuple(results), seconds, total, tuple(notes))


def _module(old: tuple[Factored, Site], new: tuple[Factored, Site]) -> Result:
    a, b = old[0].factors(old[1]), new[0].factors(new[1])
    name = name_of(old[1])
    if (a[0].shape[-1], a[1].shape[:-1]) != (b[0].shape[-1], b[1].shape[:-1]):
        raise MatchError(
            f"{name}: {old[0].adapter.path} changes {[*a[1].shape[:-1], a[0].shape[-1]]}, but {new[0].adapter.path} "
            f"{[*b[1].shape[:-1], b[0].shape[-1]]}. They are for different bases."
        )
    aa, bb, ab = inner(a, a), inner(b, b), inner(a, b)
    error2 = max(0.0, aa + bb - 2 * ab)
    metrics = {
        "rank_before": float(a[0].shape[-2]), "rank": float(b[0].shape[-2]),
        "difference": _part(error2, aa), **interference([a, b]), "error2": error2, "norm2": aa,
    }  # fmt: skip
    return Result(name, metrics, {}, {})


def _alone(path: Path, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{path} alone has {', '.join(names[:3])}{more}."] if names else []


def _part(error2: float, norm2: float) -> float:
    """Relative to the first; infinite where that is nothing."""
    if norm2 == 0:
        return math.inf if error2 else 0.0
    return math.sqrt(error2 / norm2)


def _total(results: list[Result]) -> dict[str, float]:
    error2, norm2 = (sum(r.metrics[key] for r in results) for key in ("error2", "norm2"))
    return {"difference": _part(error2, norm2)}


@dataclass(frozen=True, slots=True)
class _Compared:
    """`result` of a tensor that differs, None of one that does not; squares of the difference and of A's."""

    result: Result | None
    error2: float
    norm2: float


def _checkpoints(a: Model, b: Model, how: RunOptions) -> Report:
    started = time.perf_counter()
    both = [n for n in a.weights if n in b.weights]
    same = [n for n in both if a.weights.info(n).shape == b.weights.info(n).shape]
    if not same:
        raise MatchError(
            f"{b.path}: has no tensor in common with {a.path}. Check that they are of one kind."
        )
    items = [(n, a.weights.info(n).nbytes, n) for n in same]
    found = side_by_side(items, lambda name: _tensor(a, b, name), how)
    results = tuple(c.result for c in found if c.result)
    notes = [
        f"{n}: is {list(a.weights.info(n).shape)} in {a.path}, {list(b.weights.info(n).shape)} in {b.path}."
        for n in both if n not in same
    ]  # fmt: skip
    notes += _alone(a.path, [n for n in a.weights if n not in b.weights])
    notes += _alone(b.path, [n for n in b.weights if n not in a.weights])
    total = {
        "tensors": len(same), "identical": len(same) - len(results),
        "difference": _part(sum(c.error2 for c in found), sum(c.norm2 for c in found)),
    }  # fmt: skip
    return Report("diff", results, time.perf_counter() - started, total, tuple(notes))


def _tensor(a: Model, b: Model, name: str) -> _Compared:
    error2 = norm2 = largest = 0.0
    differing = 0
    info = max((m.weights.info(name) for m in (a, b)), key=lambda i: BITS[i.dtype])
    step, rows = tile_rows(info, 1, TILE_BYTES), info.shape[0] if info.shape else 1
    for start in range(0, rows, step):
        x, y = (_wide(m.weights.read(name, start, start + step)) for m in (a, b))
        error = y - x
        norm2, error2 = norm2 + square(x), error2 + square(error)
        # nan is unlike everything, itself too
        differing += int(np.count_nonzero(x != y))
        largest = max(largest, float(np.abs(error).max(initial=0.0)))
    for model in (a, b):
        model.weights.release(name)
    if not differing:
        return _Compared(None, 0.0, norm2)
    metrics = {
        "difference": _part(error2, norm2), "max_error": largest, "changed": differing / info.numel,
    }  # fmt: skip
    return _Compared(Result(name, metrics, {}, {}), error2, norm2)


def _wide(data: Array) -> Array:
    return data.astype(np.float64 if data.dtype.itemsize > 4 else np.float32)
