"""lorasurgery inspect: what is in a checkpoint or an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasurgery.cli._options import Printing
from lorasurgery.cli._print import emit, pairs, table
from lorasurgery.cli._sizes import show_bytes, show_count
from lorasurgery.cli._spectrum import show_spectrum
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.inspect import Inspection, Row


def command(
    path: Annotated[
        str, typer.Argument(help="Checkpoint, adapter, GGUF file, or org/name[@revision].")
    ],
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Of an adapter: singular values of each change.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option("--base", help="With --spectrum: what the changes are measured by."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="With --spectrum: draw it.")
    ] = None,
    *,
    printing: Printing,
) -> None:
    """Show what a checkpoint or adapter holds.

    Only headers are read; of a hub id they alone are fetched. A .bin file is opened by torch,
    which takes seconds. --spectrum reads the factors too.

    Example:

        lorasurgery inspect HuggingFaceTB/SmolLM2-135M-Instruct
    """
    if spectrum:
        show_spectrum(path, base, plot, printing)
        return
    if base or plot:
        raise UsageError("--base and --plot: go with --spectrum. Add it.")
    from lorasurgery.operations.inspect import inspect

    found = inspect(path)
    emit(asdict(found), lambda: _text(found, printing), printing)


def _text(found: Inspection, printing: Printing) -> str:
    rows = found.tensors if printing.verbose else found.modules
    blocks = [[found.path], pairs(list(_facts(found))), _dtypes(found.dtypes), _modules(rows)]
    return "\n\n".join("\n".join(block) for block in blocks)


def _facts(found: Inspection) -> Iterable[tuple[str, str]]:
    files = f", {found.files} files" if found.files > 1 else ""
    yield "format", found.format + files
    if found.architecture:
        yield "architecture", found.architecture
    yield "parameters", show_count(found.parameters)
    yield "size", show_bytes(found.nbytes)
    if found.quantization:
        yield "quantization", _quantization(found.quantization)
    if found.adapter:
        yield from _adapter(found.adapter)
    if found.graph:
        yield from _graph(found.graph)
    if found.surgery:
        inputs = " ".join(found.surgery["inputs"].values())
        yield "made by", f"lorasurgery {found.surgery['operation']} {inputs}"


def _quantization(facts: Mapping[str, Any]) -> str:
    if "config" in facts:
        return f"{facts['method']}, by config.json"
    parts = [facts["method"]]
    if "block_sizes" in facts:
        parts.append(f"blocks of {_list(facts['block_sizes'])}")
        parts += ["scales quantized as well"] if True in facts["double"] else []
    return (
        f"{', '.join(parts)}: {facts['weights']} weights, "
        f"{facts['bits_per_quantized_parameter']:.3f} bits per parameter "
        f"({facts['bits_per_parameter']:.3f} over all)"
    )


def _adapter(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    stabilized = ", rank-stabilized" if facts["rank_stabilized"] else ""
    yield "adapter", f"{facts['variant']}{stabilized}, {facts['layout']} layout"
    yield "rank", _list(facts["ranks"])
    yield "alpha", _list(f"{alpha:g}" for alpha in facts["alphas"])
    yield "modules", f"{facts['modules']}: {_list(facts['targets'])}"
    if facts["modules_to_save"]:
        yield "replaced", _list(facts["modules_to_save"])
    yield "base", facts["base"] or "not recorded"
    if "start" in facts:
        yield "start", f"{facts['start']}: its factors belong to what was left of the base"


def _graph(facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    opsets = _list(f"{domain} {version}" for domain, version in facts["opsets"].items())
    yield (
        "exported by",
        f"{facts['producer'] or 'not recorded'}, IR {facts['ir_version']}, {opsets}",
    )
    for name, kind in facts["inputs"].items():
        yield "input", f"{name} {kind}"
    for name, kind in facts["outputs"].items():
        yield "output", f"{name} {kind}"
    yield "operators", _list(f"{op} x{count}" for op, count in facts["operators"].items())
    yield "linear weights", str(facts["linear_weights"])
    for kind, count in facts["quantized_products"].items():
        yield "quantized", f"{kind}: {count} nodes"
    if facts["external_files"]:
        yield "data in", _list(facts["external_files"])
    if facts["sparse_initializers"]:
        yield "sparse", f"{facts['sparse_initializers']} initializers, not shown below"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values)) or "not recorded"


def _dtypes(rows: Iterable[Row]) -> list[str]:
    head = ("dtype", "tensors", "elements", "size")
    cells = [(r.name, str(r.count), show_count(r.numel), show_bytes(r.nbytes)) for r in rows]
    return table([head, *cells])


def _modules(rows: Iterable[Row]) -> list[str]:
    cells = [
        (r.name, f"{r.dtype} {list(r.shape)}", f"x{r.count}" if r.count > 1 else "") for r in rows
    ]
    name, kind = (max((len(cell[i]) for cell in cells), default=0) for i in (0, 1))
    return [f"{n:{name}}  {k:{kind}}  {count}".rstrip() for n, k, count in cells]
