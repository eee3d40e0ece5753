"""stdout is the result: a table for people, or JSON and nothing else."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import typer

from lorasurgery.cli._options import Printing


def emit(facts: Mapping[str, Any], text: Callable[[], str], printing: Printing) -> None:
    """Write the JSON to --report FILE, then print it or the text, as the flags say."""
    if printing.report:
        part = printing.report.with_name(printing.report.name + ".part")
        part.write_text(to_json(facts) + "\n")
        os.replace(part, printing.report)
    if printing.json:
        say(to_json(facts))
    elif not printing.quiet:
        say(text())


def say(text: str) -> None:
    """Print, and find out now, not at exit, whether anybody takes it: a closed pipe, a full disk."""
    try:
        typer.echo(text)
        sys.stdout.flush()
    except OSError as error:
        # or python's own flush at exit would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        error.filename = "stdout"
        raise


def to_json(facts: Mapping[str, Any]) -> str:
    """JSON that every parser takes: nan and infinity, which JSON lacks, become null."""
    return json.dumps(_finite(facts), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, numbers to the right; never cut off, however narrow the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def pairs(rows: Sequence[tuple[str, str]]) -> list[str]:
    """A name and what it is, a line each."""
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:{width}}  {value}" for name, value in rows]
