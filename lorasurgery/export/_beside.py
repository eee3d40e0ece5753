"""Adapters that stay apart: OUT/adapters/NAME, each as the runtime really reads it, its loss stated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lorasurgery.adapter import Adapter
from lorasurgery.errors import UsageError
from lorasurgery.export._target import ExportOptions, free_name
from lorasurgery.model import Model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations.convert_for import FitOptions, convert_for
from lorasurgery.operations.runtimes.near import far
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions

FOLDER = "adapters"


def check_beside(model: Model, runtime: str, options: ExportOptions) -> None:
    """Raise before anything is made, for what cannot stand beside the model."""
    for text, (adapter, weight) in zip(options.adapters, _opened(options.adapters), strict=True):
        if weight != 1.0:
            raise UsageError(
                f"--adapter {text}: an adapter beside the model is weighed by whoever loads it. Take the "
                "weight away, or pass --merge-adapters."
            )
        if options.rank is None and (odd := _far_from_lora(adapter, runtime)):
            raise UsageError(
                f"{adapter.path}: has a {odd}, which {runtime} does not read and no small LoRA equals. Pass "
                "--rank: the nearest LoRA of that rank is written, with its error."
            )
        how = FitOptions(runtime, model.path, options.allowed)
        if options.rank is None:
            convert_for(adapter.path, None, how, RunOptions())


def write_beside(
    model: Model, scratch: Path, target: Path, options: ExportOptions, how: RunOptions
) -> Report:
    """Each adapter in the runtime's layout: a directory of PEFT's, or one GGUF file."""
    runtime = _RUNTIMES[options.to]
    home = target / FOLDER
    home.mkdir()
    results: list[Result] = []
    notes: list[str] = []
    names: list[str] = []
    most = 0
    for adapter, _ in _opened(options.adapters):
        name = free_name(adapter.path, names)
        names.append(name)
        numbers = dict[str, float]()
        rank = options.rank if _far_from_lora(adapter, runtime) else None
        made = scratch / f"{name}-fitted"
        fitting = FitOptions(runtime, model.path, options.allowed, rank=rank)
        fitted = convert_for(adapter.path, made, fitting, how)
        if rank is not None:
            numbers["relative_error"] = fitted.total["relative_error"]
        if options.to == "gguf":
            os.replace(made / "adapter.gguf", home / f"{name}.gguf")
        else:
            os.replace(made, home / name)
        widest = max(r.metrics["rank"] for r in fitted.results)
        most = max(most, int(widest))
        numbers |= {"rank": widest, "modules": fitted.total["modules"]}
        results.append(Result(f"adapter {name}", numbers, {}, {}))
        notes += [f"{name}: {note}" for note in fitted.notes]
    how_to = _HOW_TO[options.to].format(rank=most, name=names[0])
    total = {"adapters": float(len(results))}
    return Report("export", tuple(results), 0.0, total, (*notes, how_to))


_RUNTIMES = {"gguf": "llamacpp", "vllm": "vllm", "transformers": "peft"}
_HOW_TO = {
    "gguf": "llama-cli -m DIR/model.gguf --lora DIR/adapters/{name}.gguf",
    "vllm": "vllm serve DIR --enable-lora --max-lora-rank {rank} --lora-modules {name}=DIR/adapters/{name}",
    "transformers": "PeftModel.from_pretrained(model, 'DIR/adapters/{name}')",
}


def _opened(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    return open_adapters(texts)


def _far_from_lora(adapter: Adapter, runtime: str) -> str | None:
    """The variant of a module that the runtime does not read and that is no product of small factors."""
    return next((s.config.variant for s in adapter.sites if far(s, runtime)), None)
