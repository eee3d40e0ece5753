"""What a merge does to each tensor: adapters laid upon a model, and one edit for every tensor of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorasurgery.adapter import Adapter
from lorasurgery.change import Change, LowRank
from lorasurgery.edit import Edit, copy_edit
from lorasurgery.errors import FormatError, ShapeError, UsageError
from lorasurgery.layouts import EMBEDDINGS, HEADS
from lorasurgery.model import Model, open_model
from lorasurgery.operations.merging import encoded, requantize
from lorasurgery.operations.merging.edits import Source, Task, merge_edit, whole_edit
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.undoing.undo_record import Kept
from lorasurgery.problems import Problem, refuse
from lorasurgery.targets import Resolved, Whole, bias_change, combine, resolve, unmatched
from lorasurgery.tensors import DTYPE_NAMES, FLOATS, TensorInfo
from lorasurgery.tied import Settled, settle, untied_config
from lorasurgery.weights import Single, codec_of

_Change = Callable[[], Change]


@dataclass(frozen=True, slots=True)
class Work:
    """A model, where the adapters' parts go in it, and how."""

    model: Model
    options: MergeOptions
    settled: Settled
    original: Model | None
    notes: tuple[str, ...]

    @property
    def resolved(self) -> Resolved:
        return self.settled.resolved

    @property
    def requantized(self) -> list[str]:
        """Packed weights that are encoded anew."""
        packed = self.model.weights.packed
        return [n for n in packed if self.options.policy and self.change(n)]

    def names(self) -> list[str]:
        """Every tensor of the output, the base's first."""
        wanted = [*self.settled.copies, *self.resolved.replaced, *self.resolved.targets]
        return list(dict.fromkeys([*self.model.weights, *wanted]))

    def edits(self) -> Iterator[Edit]:
        return (self._edit(name) for name in self.names())

    def change(self, name: str, seen: Source | None = None) -> _Change | None:
        """What is added to this tensor, whose weight as the adapter sees it is read from `seen`."""
        if name in self.resolved.targets:
            read = partial(seen.checkpoint.read, seen.name) if seen else None
            # a packed weight may be seen as its original, and then another one is added to
            return partial(self.resolved.targets[name].change, read, own=not self.options.policy)
        if name in self.resolved.added:
            return partial(bias_change, self.resolved.added[name])
        return None

    def kept(self) -> list[Kept]:
        """What the undo file will hold, in the order of the edits."""
        found = [self._kept(name) for name in self.names()]
        return [kept for kept in found if kept]

    def files(self) -> dict[str, bytes | Path]:
        """The side files, with a config that says what has become of the weights."""
        config = self._config()
        unchanged = config == self.model.config
        return dict(self.model.files) if unchanged else self.model.with_config(config)

    def _edit(self, name: str) -> Edit:
        whole = self.resolved.replaced.get(name)
        if self.options.policy and name in self.model.weights.packed:
            return self._packed_edit(name, whole)
        if self._untouched(name):
            return copy_edit(self.model.stored, name)
        out, source = self._out(name), self._source(name, whole)
        if source.info.dtype not in FLOATS:
            return whole_edit(source, out, self._kept(name))
        change, rounding = self.change(name, source), self.options.rounding
        return merge_edit(
            Task(out, source, change, rounding, self._kept(name), replaced=whole is not None)
        )

    def _packed_edit(self, name: str, whole: Whole | None) -> Edit:
        values = self._source(name, whole)
        change = self.change(name, values)
        if change is None and whole is None:
            return requantize.copy_packed(self.model, name)
        info = self.model.weights.info(name)
        if whole is None and self.options.policy == "from-original" and self.original:
            values = Source(self.original.weights, name)
        return requantize.requantize_edit(
            encoded.Task(
                self.model, name, values, change or (lambda: LowRank.nothing(info)),
                self.options.policy or "", self.options.rounding, self.options.rank,
                self._kept(name),
            )
        )  # fmt: skip

    def _untouched(self, name: str) -> bool:
        """Whether the base's bytes are the output's."""
        weights = self.model.weights
        if name not in weights or name in weights.packed or name in self.resolved.replaced:
            return False
        return self.change(name) is None and self._out(name).dtype == weights.info(name).dtype

    def _out(self, name: str) -> TensorInfo:
        """Of the base's dtype if the base has it, and of the shape that comes out."""
        whole, weights = self.resolved.replaced.get(name), self.model.weights
        stored = self.settled.copies.get(name, name)
        base = weights.info(stored) if stored in weights else None
        info = whole.info if whole else base
        assert info is not None, name
        dtype = base.dtype if base else info.dtype
        if dtype in FLOATS and info.dtype in FLOATS:
            dtype = self.options.dtype or dtype
        return TensorInfo(name, dtype, info.shape)

    def _source(self, name: str, whole: Whole | None) -> Source:
        if whole:
            info = replace(whole.info, name=name)
            return Source(Single(whole.adapter.path, info, whole.load()), name)
        packed = self.model.weights.packed.get(name)
        if packed is None:
            return Source(self.model.weights, self.settled.copies.get(name, name))
        multiple = codec_of(packed.codec).multiple(packed)
        seen = self.original if self.options.view == "original" else None
        return Source((seen or self.model).weights, name, multiple)

    def _kept(self, name: str) -> Kept | None:
        if self.options.undo is None or name not in self.model.weights or self._untouched(name):
            return None
        whole = name in self.resolved.replaced
        if self.options.policy and self.change(name) is None and not whole:
            return None
        scales = self.options.policy != "keep-absmax"
        return Kept(self.model, name, whole, scales)

    def _config(self) -> Mapping[str, Any]:
        config = self.model.config
        if self.model.weights.packed and not self.options.policy:
            config = {k: v for k, v in config.items() if k != "quantization_config"}
        if self.settled.untied:
            config = untied_config(config)
        if self.options.dtype:
            names = {code: name for name, code in DTYPE_NAMES.items()}
            said = {k: names[self.options.dtype] for k in ("dtype", "torch_dtype") if k in config}
            config = {**config, **said}
        rows = _vocabulary(self.model, self.resolved)
        return {**config, "vocab_size": rows} if rows and "vocab_size" in config else config


def lay_upon(
    model: Model, adapters: Sequence[tuple[Adapter, float]], options: MergeOptions
) -> Work:
    """Find a place for every part, or raise: MatchError, ShapeError, UsageError, FormatError."""
    options.check(model)
    parts = combine([resolve(model, adapter, weight) for adapter, weight in adapters])
    settled = settle(model, parts, options.tied)
    resolved = settled.resolved
    misfits = _misfits(model, resolved)
    where = ", ".join(str(adapter.path) for adapter, _ in adapters)
    left = refuse(
        where, [*resolved.problems, *unmatched(model, resolved), *misfits], options.allowed
    )
    replaced = {n: w for n, w in resolved.replaced.items() if n not in {p.name for p in misfits}}
    settled = replace(settled, resolved=replace(resolved, replaced=replaced))
    original = open_model(options.original) if options.original else None
    work = Work(model, options, settled, original, _notes(model, settled, left))
    _check(work)
    return work


def _notes(model: Model, settled: Settled, left: Sequence[Problem]) -> tuple[str, ...]:
    new = [n for n in settled.resolved.replaced if n not in model.weights]
    added = [f"{name} is new: the base has no such tensor." for name in sorted(new)]
    return (*settled.notes, *added, *(f"left out: {problem.message}" for problem in left))


def _misfits(model: Model, resolved: Resolved) -> list[Problem]:
    """Replacements of another shape than the base's; an embedding may have grown or shrunk."""
    problems = []
    for name, whole in resolved.replaced.items():
        if name not in model.weights:
            continue
        shape, got = model.weights.info(name).shape, whole.info.shape
        resized = name.endswith((*EMBEDDINGS, *HEADS)) and shape[1:] == got[1:]
        if shape != got and not resized:
            message = (
                f"{name}: the adapter replaces it by {list(got)}, but the base has {list(shape)}"
            )
            problems.append(Problem(name, message))
    return problems


def _vocabulary(model: Model, resolved: Resolved) -> int | None:
    """The number of rows of an embedding that the adapter has resized."""
    for name, whole in resolved.replaced.items():
        if name.endswith(EMBEDDINGS) and name in model.weights:
            rows = whole.info.shape[0]
            return rows if rows != model.weights.info(name).shape[0] else None
    return None


def _check(work: Work) -> None:
    model, resolved = work.model, work.resolved
    if not (resolved.targets or resolved.replaced or resolved.added):
        raise UsageError(f"{model.path}: nothing is left of the adapter to merge.")
    for name in (*resolved.targets, *resolved.added):
        info = model.weights.info(work.settled.copies.get(name, name))
        if info.dtype not in FLOATS:
            raise FormatError(
                f"{model.path}: {info}: the adapter changes it, but {info.dtype} holds codes of an "
                "unknown kind. Merge into the unquantized model."
            )
    for name, whole in resolved.replaced.items():
        if whole.weight != 1.0 and name not in resolved.targets:
            raise UsageError(
                f"{whole.adapter.path}: weight {whole.weight:g}: it replaces {name} as a whole, which "
                "cannot be weighed. Merge it with weight 1."
            )
    if work.original:
        _check_original(model, work.original)


def _check_original(model: Model, original: Model) -> None:
    for name, packed in model.weights.packed.items():
        if name not in original.weights:
            raise FormatError(f"{original.path}: has no {name}. Is it the base's original?")
        info = original.weights.info(name)
        if name in original.weights.packed or info.dtype not in FLOATS:
            raise FormatError(f"{original.path}: {name} is quantized too. Name the original.")
        if info.shape != packed.info.shape:
            raise ShapeError(
                f"{original.path}: {name} is {list(info.shape)}, but {list(packed.info.shape)} in "
                f"{model.path}. Is it the base's original?"
            )
