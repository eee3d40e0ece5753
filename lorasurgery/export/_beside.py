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
from lorasurgery.operations.algebra.adapter_output import AdapterFormat
from lorasurgery.operations.algebra.convert_options import ConvertOptions
from lorasurgery.operations.algebra.made import variant_of
from lorasurgery.operations.algebra.nearest import Aim
from lorasurgery.operations.convert import convert
from lorasurgery.operations.convert_for import FitOptions, convert_for
from lorasurgery.operations.runtimes.claims import RUNTIMES
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
        path, numbers = adapter.path, dict[str, float]()
        if _far_from_lora(adapter, runtime):
            near = ConvertOptions(
                base=model.path,
                aim=Aim(options.rank),
                allowed=options.allowed,
                form=AdapterFormat("peft"),
            )
            path = scratch / f"{name}-near"
            lost = convert(adapter.path, path, near, how)
            numbers = {"relative_error": lost.total["relative_error"]}
        made = scratch / f"{name}-fitted"
        fitted = convert_for(path, made, FitOptions(runtime, model.path, options.allowed), how)
        if options.to == "gguf":
            os.replace(made / "adapter.gguf", home / f"{name}.gguf")
        else:
            os.replace(made, home / name)
        rank = max(r.metrics["rank"] for r in fitted.results)
        most = max(most, int(rank))
        numbers |= {"rank": rank, "modules": fitted.total["modules"]}
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
    if runtime == "peft":
        return None
    for site in adapter.sites:
        claims, name = RUNTIMES[runtime].claims, site.config.variant
        claim = claims.get("DoRA" if name == "dora" else "other variants")
        if name == "lora" or (claim and claim.verdict == "ok"):
            continue
        if variant_of(site).low_rank(site.load(), site.config) is None:
            return name
    return None
