"""The lint command: what a runtime would make of an adapter."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasurgery.cli._options import Printing
from lorasurgery.cli._print import emit

if TYPE_CHECKING:
    from lorasurgery.operations.lint import Lint, Row


def command(
    adapter: Annotated[str, typer.Argument(help="Adapter: directory, file or hub id.")],
    runtime: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="RUNTIME",
            help="vllm, sglang, llamacpp, ort, diffusers, kohya or peft.",
        ),
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="The model it is for: names are compared with it.")
    ] = None,
    *,
    printing: Printing,
) -> None:
    """Tell what a runtime would refuse, or compute wrongly, of an adapter.

    Exit code 3 if it refuses anything or gets anything silently wrong. What is unknown has not been looked into:
    it is no promise. Each line names the source that was read, or run, and since and until when it is known to be so.

    Example:

        lorasurgery lint my-lora --for vllm
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.lint import insist, lint

    found = lint(resolve(adapter), runtime, resolve(base) if base else None)
    emit(_facts(found), lambda: _text(found, printing), printing)
    insist(found)


def _facts(found: Lint) -> dict[str, Any]:
    return {
        "operation": "lint",
        "adapter": str(found.adapter),
        "runtime": found.runtime,
        "ok": not found.bad,
        "features": [asdict(row) for row in found.rows],
    }


def _text(found: Lint, printing: Printing) -> str:
    if not found.rows:
        return f"{found.adapter}: plain LoRA of one rank and one alpha; {found.runtime} reads it"
    width = max(len(row.feature) for row in found.rows)
    return "\n".join(line for row in found.rows for line in _lines(row, width, printing))


def _lines(row: Row, width: int, printing: Printing) -> list[str]:
    count = f"{len(row.where)} x: " if row.where else ""
    source = f" [{row.source}: {row.versions}]" if row.source else ""
    verdict = "silently wrong" if row.verdict == "silent" else row.verdict
    lines = [f"{row.feature:{width}}  {verdict:14}  {count}{row.why}{source}"]
    return lines + [f"  {name}" for name in row.where] if printing.verbose else lines
