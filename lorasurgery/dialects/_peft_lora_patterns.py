"""Names and patterns of modules in PEFT's configs, looked up: an adapter of experts has a path for each of thousands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

from lorasurgery.errors import FormatError

T = TypeVar("T")
# a pattern that is a path, which ends what it fits, or with ^ is all of it
_PATH = re.compile(r"\^?[\w.-]+")


def listed(names: Iterable[str], module: str) -> bool:
    """Whether one of the names is the module's path or an end of it."""
    return not _set(_Same(names)).isdisjoint(_ends(module))


def fitting(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits the module's path or an end of it.

    The dots of a pattern that is a path stand for dots alone.
    """
    if not patterns:
        return otherwise
    places = _places(_Same(patterns))
    found = [places.paths.get(end, len(patterns)) for end in (f"^{module}", *_ends(module))]
    first = min(found)
    for place, pattern in places.others:
        if place > first:
            break
        if match(rf"(.*\.)?({pattern})$", module):
            first = place
            break
    return places.values[first] if first < len(patterns) else otherwise


def match(pattern: str, text: str) -> re.Match[str] | None:
    """As re.match; raises FormatError for what is no regular expression."""
    try:
        return re.match(pattern, text)
    except re.error as error:
        raise FormatError(
            f"adapter_config.json: {pattern!r} is no regular expression ({error}). Mend it."
        ) from None


def _ends(path: str) -> Iterator[str]:
    """a.b.c, b.c, c."""
    yield path
    for dot in re.finditer(r"\.", path):
        yield path[dot.end() :]


@dataclass(frozen=True, slots=True, eq=False)
class _Same(Generic[T]):
    """Part of a config, which does not change: the same object is the same key, however long it is."""

    of: T

    def __hash__(self) -> int:
        return id(self.of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.of is self.of


@dataclass(frozen=True, slots=True)
class _Places:
    """Patterns by their place in the config: paths, and what only a regular expression says."""

    paths: Mapping[str, int]
    others: Sequence[tuple[int, str]]
    values: Sequence[Any]


@lru_cache(maxsize=8)
def _set(names: _Same[Iterable[str]]) -> frozenset[str]:
    return frozenset(names.of)


@lru_cache(maxsize=8)
def _places(patterns: _Same[Mapping[str, Any]]) -> _Places:
    paths, others = {}, []
    for place, pattern in enumerate(patterns.of):
        if _PATH.fullmatch(pattern):
            paths[pattern] = place
        else:
            others.append((place, pattern))
    return _Places(paths, others, list(patterns.of.values()))
