"""Names that differ in their numbers alone become one: layers.{0..29}.mlp.up_proj.weight."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component between dots


@dataclass(frozen=True, slots=True)
class Fold(Generic[T]):
    """The members that one folded name stands for."""

    name: str
    members: tuple[T, ...]


def fold(
    items: Iterable[T], name: Callable[[T], str], alike: Callable[[T], Hashable]
) -> list[Fold[T]]:
    """Items whose names differ in numbers alone and that are alike, in order of first appearance."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault((_NUMBER.sub("#", name(item)), alike(item)), []).append(item)
    return [Fold(_folded([name(m) for m in group]), tuple(group)) for group in groups.values()]


def natural(name: str) -> list[str | int]:
    """A sorting key by which layer 2 comes before layer 10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def _folded(names: list[str]) -> str:
    """One name with the numbers of all of them: {0..29}, {0,2,4..6}."""
    columns = zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True)
    ranges = iter([_ranges(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(ranges), names[0])


def _ranges(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return f"{{{','.join(_run(run) for run in runs)}}}"


def _run(run: list[int]) -> str:
    return str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}"
