"""Where each parameter's two moments lie in one space of bytes, and how that space is cut into pages.

The moments m and v of a byte have the same address, each in its own half of a page. A parameter begins at a
multiple of 128 bytes, and pages are multiples of that, so that no element lies in two of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorasurgery.errors import UsageError

ALIGNED = 128
PAGE = 1 << 20  # bytes of both halves, unless the budget is small
_FEWEST = 4  # pages that a budget should hold: one in use, one that is fetched, and some that stay


@dataclass(frozen=True, slots=True)
class Segment:
    """A parameter's bytes start:stop, at `at` in the page."""

    parameter: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Layout:
    """`half` bytes of each moment in a page; `slots` pages in memory at once."""

    places: tuple[int, ...]  # where each parameter begins
    sizes: tuple[int, ...]
    half: int
    slots: int

    @property
    def pages(self) -> int:
        return -(-self.space // self.half)

    @property
    def space(self) -> int:
        """Bytes of one moment of everything."""
        return self.places[-1] + _up(self.sizes[-1]) if self.sizes else 0

    @property
    def whole(self) -> bool:
        """Whether all of it is in memory, always."""
        return self.slots >= self.pages

    def segments(self) -> list[list[Segment]]:
        """What each page holds, in the parameters' order."""
        found: list[list[Segment]] = [[] for _ in range(self.pages)]
        for i, (place, size) in enumerate(zip(self.places, self.sizes, strict=True)):
            at = place
            while at < place + size:
                page, inside = divmod(at, self.half)
                stop = min(place + size, (page + 1) * self.half)
                found[page].append(Segment(i, at - place, stop - place, inside))
                at = stop
        return found


def layout(sizes: Sequence[int], budget: int | None) -> Layout:
    """For parameters of so many bytes. Raises UsageError for a budget that holds no page."""
    places, at = [], 0
    for size in sizes:
        places.append(at)
        at += _up(size)
    if budget is not None and budget < 2 * ALIGNED:
        raise UsageError(
            f"--state-budget: {budget} bytes hold no page, the least of which has {2 * ALIGNED}. Allow more."
        )
    if budget is None or budget >= 2 * at:
        return Layout(tuple(places), tuple(sizes), max(at, ALIGNED), 1)
    half = max(ALIGNED, min(PAGE, budget // _FEWEST) // (2 * ALIGNED) * ALIGNED)
    return Layout(tuple(places), tuple(sizes), half, budget // (2 * half))


def _up(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
