"""Adapters as they are typed: a directory, a file or a hub id, and after a colon a weight."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Dialect
from lorasurgery.errors import FormatError
from lorasurgery.model import Model, resolve
from lorasurgery.targets import completed

_WEIGHT = re.compile(r"(?P<name>.+):(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)")


def open_adapters(texts: Sequence[str], base: Model | None = None) -> list[tuple[Adapter, float]]:
    """Each adapter with its weight, 1 unless `:0.5` stands after it; headers alone are read.

    What depends on a base's shapes is taken from `base`. Raises FormatError for a path that holds no adapter, and what its dialect raises.
    """
    opened = [(open_adapter(resolve(name)), weight) for name, weight in map(split_weight, texts)]
    return [(completed(base, a) if base else a, weight) for a, weight in opened]


def split_weight(text: str) -> tuple[str, float]:
    """`PATH:0.5` as (PATH, 0.5); a colon in the name of a path that exists belongs to the name."""
    match = None if Path(text).exists() else _WEIGHT.fullmatch(text)
    return (match["name"], float(match["weight"])) if match else (text, 1.0)


def open_adapter(path: Path) -> Adapter:
    """The adapter at a path, in whichever dialect claims it."""
    if not path.exists():
        raise FormatError(f"{path}: no such file or directory. Check the adapter's path.")
    if (dialect := dialect_of(path)) is not None:
        return dialect.read(path)
    known = ", ".join(plugins.names("dialects"))
    raise FormatError(
        f"{path}: holds no adapter in a layout that is known ({known}). Check the path."
    )


def dialect_of(path: Path) -> Dialect | None:
    """The layout that claims this path; None for what is no adapter."""
    for name in plugins.names("dialects"):
        dialect = cast(Dialect, plugins.load("dialects", name))
        if dialect.detect(path):
            return dialect
    return None
