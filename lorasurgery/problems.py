"""What an adapter holds and nobody can place: collected first, then refused in one line or allowed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasurgery.errors import MatchError


@dataclass(frozen=True, slots=True)
class Problem:
    """One part of an adapter that has no place, by the name that --allow-unmatched goes by."""

    name: str
    message: str


def refuse(where: object, problems: Iterable[Problem], allowed: Sequence[str]) -> list[Problem]:
    """Raise MatchError for what no pattern allows; return what will be left out."""
    found = list(problems)
    for pattern in allowed:
        if not any(fnmatch.fnmatchcase(p.name, pattern) for p in found):
            raise MatchError(
                f"{where}: --allow-unmatched {pattern!r} allows nothing: no unmatched part has such "
                "a name. Take it away."
            )
    left = [p for p in found if not any(fnmatch.fnmatchcase(p.name, a) for a in allowed)]
    if left:
        more = f" ({len(left) - 1} more like it: {_some(left[1:])})" if left[1:] else ""
        raise MatchError(
            f"{where}: {left[0].message}{more}. Mend it, or leave it out with "
            f"--allow-unmatched '{left[0].name}'."
        )
    return found


def _some(problems: Sequence[Problem]) -> str:
    names = [p.name for p in problems]
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
