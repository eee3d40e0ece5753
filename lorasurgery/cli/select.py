"""lorasurgery select: which modules an adapter is to have factors of their own for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorasurgery.cli._options import Base, Printing
from lorasurgery.cli._print import emit, pairs, table
from lorasurgery.cli.train import How, Kept, Seen, What, train_options
from lorasurgery.operations.inspecting.folding import fold

if TYPE_CHECKING:
    from lorasurgery.training.kept import Weighed
    from lorasurgery.training.select import Selected


def command(
    base: Base,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE|DIR|HUB", help=".txt or .jsonl; repeatable."),
    ],
    method: Annotated[  # noqa: ARG001 - there is one
        Literal["lora-drop"], typer.Option("--method", "-m", help="How modules are weighed.")
    ] = "lora-drop",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="For `train --method lora-drop --keep`."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            "-T",
            help="The importance that the kept modules have together, at least.",
        ),
    ] = 0.9,
    over: Annotated[
        Literal["group", "all"],
        typer.Option("--over", help="The share of each kind and size of module, or of all."),
    ] = "group",
    sample: Annotated[
        float, typer.Option("--sample", help="The share of the examples that is looked at.")
    ] = 0.1,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="A picture, layer x module.")
    ] = None,
    *,
    what: What,
    how: How,
    seen: Seen,
    printing: Printing,
) -> None:
    """Tell which modules an adapter needs, from a little training on a sample (LoRA-drop).

    A LoRA is trained on every module; a module's importance is the energy of what its own adds to outputs.

    Example:

        lorasurgery select org/model --data chats.jsonl -o keep.json

        lorasurgery train org/model --data chats.jsonl -o adapter --method lora-drop --keep keep.json
    """  # fmt: skip
    from lorasurgery.model import resolve
    from lorasurgery.operations.inspecting.picture import Scale, check_file, heat_map
    from lorasurgery.training.kept import check_new
    from lorasurgery.training.select import Selecting, select

    if plot:
        check_file(plot)
    if output:
        check_new(output, overwrite=overwrite)
    options = train_options(base, data, "lora", (what, how, None, Kept(), seen))
    source = resolve(base)
    found = select(source, options, Selecting(threshold, over, sample))
    if output:
        found.kept.write(output)
    emit(_facts(found, output), lambda: _text(found, output, printing), printing)
    if plot:
        values = {one.module: one.share for one in found.kept.modules}
        heat_map(plot, values, Scale("share of importance", 0.0, max(values.values())))


def _facts(found: Selected, output: Path | None) -> dict[str, Any]:
    modules = [_row(one) for one in found.kept.modules]
    return {
        "operation": "select", **found.kept.said, "examples": found.examples, "tokens": found.tokens,
        "output": str(output) if output else None, "modules": modules,
    }  # fmt: skip


def _row(one: Weighed) -> dict[str, Any]:
    return {
        "module": one.module, "group": one.group, "output2": one.output2,
        "importance": one.importance, "share": one.share, "kept": one.kept,
    }  # fmt: skip


def _text(found: Selected, output: Path | None, printing: Printing) -> str:
    """A row for each module with -v, or else for each kind of module."""
    kept = found.kept
    head = ["module", "importance", "kept"]
    if printing.verbose:
        ordered = sorted(kept.modules, key=lambda one: -one.importance)
        rows = [
            [one.module, f"{100 * one.importance:.3g} %", "yes" if one.kept else ""]
            for one in ordered
        ]
    else:
        folds = fold(kept.modules, lambda one: one.module, lambda one: one.group)
        rows = [
            [
                f.name,
                f"{100 * sum(one.importance for one in f.members):.3g} %",
                f"{sum(one.kept for one in f.members)} of {len(f.members)}",
            ]
            for f in folds
        ]
    done = f"wrote {output}" if output else "nothing written: pass -o FILE for `train --keep`"
    totals = pairs([
        ("modules", str(len(kept.modules))), ("kept", str(len(kept.keep))),
        ("examples", str(found.examples)), ("tokens", str(found.tokens)),
    ])  # fmt: skip
    return "\n".join([*table([head, *rows]), "", *totals, f"{done} in {found.seconds:.1f} s"])
