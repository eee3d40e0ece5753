"""An ONNX model's base, byte for byte: its own files again, by what `merge --undo` kept of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from lorasurgery import targets
from lorasurgery.adapter import Adapter
from lorasurgery.change import Change
from lorasurgery.errors import FormatError, OutputError
from lorasurgery.export._onnx_modules import Modules, open_modules
from lorasurgery.export._onnx_write import check_file, partial_folder
from lorasurgery.formats.onnx import File
from lorasurgery.model import Model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations._onnx_laid import plain
from lorasurgery.operations._onnx_output import write_manifest
from lorasurgery.operations.undoing.onnx_rebuild import Rebuild
from lorasurgery.operations.undoing.undo_read import UndoFile
from lorasurgery.operations.unmerge import check_adapters
from lorasurgery.place import check_room, writing
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions


def unmerge_onnx(
    merged: Path, adapters: Sequence[str], output: Path | None, undo_file: Path, how: RunOptions
) -> Report:
    """Write the base's model file as OUT, and its data files beside it under their own names.

    Raises VerificationError where the base's bytes do not come back, MatchError where the undo file
    names other adapters, FormatError for an undo file of another merge, OutputError for names that are taken.
    """
    started = time.perf_counter()
    undo = UndoFile(undo_file)
    if "onnx" not in undo.facts:
        raise FormatError(f"{undo_file}: was written for a checkpoint, and {merged} is a graph.")
    file = File(merged)
    model, view = open_modules(file, _modules(file, undo))
    opened = [(plain(adapter), weight) for adapter, weight in open_adapters(adapters, model)]
    check_adapters(opened, undo)
    if output:
        _write(view, _changes(model, opened), undo, output, how)
    restored = {name: float(model.weights.info(name).numel) for name in _restored(view, undo)}
    results = tuple(Result(n, {"restored": size}, {}, {}) for n, size in restored.items())
    report = Report(
        "unmerge", results, time.perf_counter() - started,
        {"tensors": len(results), "restored": sum(restored.values())},
        ("every restored tensor has the base's hash.",),
    )  # fmt: skip
    if output:
        inputs = {"merged": merged, "undo": undo_file}
        inputs |= {f"adapter {i}": a.path for i, (a, _) in enumerate(opened, 1)}
        write_manifest(output, report, {"adapters": list(adapters)}, inputs)
    return report


def _modules(file: File, undo: UndoFile) -> dict[str, str]:
    """What each changed weight was called in the base, whose graph told it."""
    _, view = open_modules(file, {})
    products = {linear.initializer for linear in view.linears.values()}
    return {
        name.removesuffix(".weight"): initializer
        for initializer, name in undo.facts["changed"].items()
        if initializer in products and name.endswith(".weight")
    }


def _restored(view: Modules, undo: UndoFile) -> list[str]:
    return [name for name in undo.facts["changed"].values() if name in view]


def _changes(
    model: Model, adapters: Sequence[tuple[Adapter, float]]
) -> Mapping[str, Callable[[], Change]]:
    """What was added to each tensor, as far as it does not depend on the tensor."""
    resolved = targets.combine([targets.resolve(model, a, weight) for a, weight in adapters])
    changes: dict[str, Callable[[], Change]] = {n: t.change for n, t in resolved.targets.items()}
    return changes | {n: partial(targets.bias_change, of) for n, of in resolved.added.items()}


def _write(
    view: Modules,
    changes: Mapping[str, Callable[[], Change]],
    undo: UndoFile,
    output: Path,
    how: RunOptions,
) -> None:
    first, *others = undo.facts["onnx"]
    check_file(output, view.path, overwrite=how.output.overwrite)
    beside = [(entry, output.parent / entry["file"]) for entry in others]
    for _, path in beside:
        _check_free(path, view.file, overwrite=how.output.overwrite)
    total = sum(entry["size"] for entry in undo.facts["onnx"])
    check_room(output, total)
    finished = 0

    def done(name: str, nbytes: int) -> None:
        nonlocal finished
        finished += nbytes
        how.progress(min(finished, total), total, name)

    rebuild = Rebuild(view, undo, changes, done)
    with partial_folder(output) as folder, writing(output, "the model"):
        made = [(folder / str(i), path) for i, (_, path) in enumerate(beside)]
        for (entry, _), (new, _) in zip(beside, made, strict=True):
            rebuild.write(entry, new)
        rebuild.write(first, folder / output.name)
        for new, path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(new, path)
        os.replace(folder / output.name, output)


def _check_free(path: Path, merged: File, *, overwrite: bool) -> None:
    if any(path.resolve() == used.resolve() for used in merged.data_files):
        raise OutputError(
            f"{path}: the base has data in a file of this name, and so has the input. Name an output in "
            "another directory."
        )
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path}: the base has data in a file of this name, which exists. Name an output in another "
            "directory, or pass --overwrite."
        )
