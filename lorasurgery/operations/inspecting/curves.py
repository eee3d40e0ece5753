"""A training's metrics as curves over its steps: loss, what is held out, learning rates. Drawn by matplotlib."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from lorasurgery.operations.inspecting.picture import figure_of, save

Points: TypeAlias = tuple[Sequence[float], Sequence[float]]


def read(metrics: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in metrics.read_bytes().splitlines()]


def points(rows: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Steps and values, of the rows that have one."""
    known = [row for row in rows if name in row]
    return [row["step"] for row in known], [row[name] for row in known]


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Losses on the left, rates on the right, into a .png, .svg or .pdf."""
    figure = figure_of(9.0, 3.6)
    left, right = figure.subplots(1, 2)
    left.plot(*points(rows, "loss"), linewidth=1, label="loss")
    held = points(rows, "eval_loss")
    if held[0]:
        left.plot(*held, marker="o", markersize=3, label="held out")
    for name in dict.fromkeys(key for row in rows for key in row if key.startswith("rate")):
        right.plot(*points(rows, name), linewidth=1, label=name)
    for axes, title in ((left, "loss, nats per token"), (right, "learning rate")):
        axes.set_xlabel("step")
        axes.set_title(title)
        if rows:
            axes.legend()
    save(figure, path)
