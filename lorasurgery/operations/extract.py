"""Find the adapter in a fine-tuned model: the best low-rank part of W' - W, one tensor at a time.

What no low rank can say (norms, biases, embeddings that grew, new tensors) is kept whole, or named.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import blake3
import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array, as_bytes
from lorasurgery.errors import MatchError, ValueRangeError
from lorasurgery.model import Model, matches, open_model
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.layers import Layer, layer_of
from lorasurgery.operations.algebra.made import kept, side_by_side
from lorasurgery.operations.algebra.nearest import Aim, loss, nearest, total
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions
from lorasurgery.tensors import TensorInfo

_TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExtractOptions:
    """`aim` says how much of each change is wanted; `name` is the base's, for the adapter's config."""

    aim: Aim
    name: str | None = None
    save_others: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two models, and what of the tuned one is to be found out."""

    base: Model
    tuned: Model
    options: ExtractOptions

    def layer(self, name: str) -> Layer | None:
        """None for what no product of factors can say, or is not asked for."""
        if name not in self.base.weights or name not in self.tuned.weights:
            return None
        if self.base.weights.info(name).shape != self.tuned.weights.info(name).shape:
            return None
        wanted = not self.options.include or matches(name, self.options.include)
        if not wanted or matches(name, self.options.exclude):
            return None
        return layer_of(self.tuned, name)


@dataclass(frozen=True, slots=True)
class _Found:
    """What became of one tensor: a site, or a change that is none of a low rank, or nothing at all."""

    name: str
    result: Result | None = None
    site: Site | None = None
    changed: bool = False


def extract(
    base: Path, tuned: Path, output: Path | None, options: ExtractOptions, how: RunOptions
) -> Report:
    """Write what turns `base` into `tuned` as a LoRA; no output: only the report.

    Raises MatchError for models that have nothing in common, ValueRangeError for nan and inf.
    """
    started = time.perf_counter()
    options.aim.check()
    pair = _Pair(open_model(base), open_model(tuned), options)
    inputs = {"base": base, "finetuned": tuned}
    check_ready(output, inputs, how)
    names = list(pair.tuned.weights)
    if not any(pair.layer(n) for n in names):
        raise MatchError(
            f"{tuned}: has no weight matrix in common with {base}. Check that one was made of the other."
        )
    items = [(n, pair.tuned.weights.info(n).nbytes, n) for n in names]
    found = side_by_side(items, lambda name: _find(pair, name), how)
    others = [f.name for f in found if f.changed and f.site is None]
    adapter = _adapter(pair, [f.site for f in found if f.site], others)
    results = tuple(f.result for f in found if f.result)
    settings = {
        **options.aim.settings, "save_others": options.save_others, "dtype": options.form.dtype,
    }  # fmt: skip
    counts = {
        "modules": len(adapter.sites),
        "saved_whole": len(adapter.replaced),
        "left_out": 0 if options.save_others else len(others),
    }
    outcome = Outcome(
        "extract", adapter, inputs, settings, results, {**counts, **total(results)},
        _notes(pair, others), started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _find(pair: _Pair, name: str) -> _Found:
    layer = pair.layer(name)
    if name not in pair.base.weights:
        return _Found(name, changed=True)
    old, new = pair.base.weights.read(name), pair.tuned.weights.read(name)
    same = old.shape == new.shape and old.dtype == new.dtype and np.array_equal(old, new)
    if layer is None or same:
        _release(pair, name)
        return _Found(name, changed=not same and not _equal(old, new))
    read = {name: f"blake3:{blake3.blake3(as_bytes(old)).hexdigest()}"}
    delta = layer.seen(new.astype(np.float32) - old.astype(np.float32))
    _release(pair, name)
    if not np.isfinite(delta).all():
        raise ValueRangeError(
            f"{name}: the difference of {pair.tuned.path} and {pair.base.path} is nan or infinite. "
            "Look for it in both."
        )
    if not delta.any():
        return _Found(name)
    a, b, error2, norm2 = nearest(delta, pair.options.aim)
    metrics = {"rank": float(a.shape[-2]), **loss(error2, norm2)}
    return _Found(name, Result(name, metrics, read, {}), kept(layer.site, a, b))


def _equal(old: Array, new: Array) -> bool:
    """Whether they are the same numbers in two dtypes."""
    return old.shape == new.shape and np.array_equal(old.astype(np.float64), new.astype(np.float64))


def _release(pair: _Pair, name: str) -> None:
    pair.base.weights.release(name)
    pair.tuned.weights.release(name)


def _adapter(pair: _Pair, sites: list[Site], others: list[str]) -> Adapter:
    tuned = pair.tuned
    architectures = [str(a) for a in pair.base.config.get("architectures") or []]
    task = next((t for a in architectures for end, t in _TASKS.items() if a.endswith(end)), None)
    saved = others if pair.options.save_others else []
    return Adapter(
        path=tuned.path,
        dialect="peft",
        base=pair.options.name or str(pair.base.path),
        sites=tuple(sites),
        replaced={name: replace(tuned.weights.info(name), name=name) for name in saved},
        added={},
        load=tuned.weights.read,
        load_added=tuned.weights.read,
        settings={"task_type": task},
        base_config=pair.base.config,
    )


def _notes(pair: _Pair, others: list[str]) -> tuple[str, ...]:
    base, tuned = pair.base.weights, pair.tuned.weights
    what = "kept whole" if pair.options.save_others else "left out (--save-others keeps it whole)"
    notes = [f"{name}: {_why(base.info(name) if name in base else None, tuned.info(name))}; {what}."
             for name in others]  # fmt: skip
    gone = [
        f"{name}: the base has it, the fine-tuned model does not."
        for name in base
        if name not in tuned
    ]
    return (*notes, *gone)


def _why(old: TensorInfo | None, new: TensorInfo) -> str:
    """Why a changed tensor has no low-rank change."""
    if old is None:
        return f"is new, {list(new.shape)}"
    if old.shape != new.shape:
        return f"was {list(old.shape)}, is {list(new.shape)}"
    return "changed, and is no matrix that is adapted"
