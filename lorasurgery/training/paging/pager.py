"""Which pages are in the arena: the least recently used goes, and is written back if it was changed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorasurgery.training.paging.layout import Layout
from lorasurgery.training.paging.tiers import Tier


@dataclass(slots=True)
class Moved:
    """Pages since it was last asked."""

    fetched: int = 0
    written: int = 0


@dataclass(slots=True)
class Pager:
    """An arena of `slots` pages, made once; a page that was never written is zeros and is not fetched.

    `tier` makes what is below when the first page has to leave.
    """

    layout: Layout
    device: torch.device
    tier: Callable[[], Tier]
    moved: Moved = field(default_factory=Moved)
    _arena: Tensor = field(init=False)
    _slots: OrderedDict[int, int] = field(default_factory=OrderedDict)  # page -> slot, oldest first
    _dirty: set[int] = field(default_factory=set)
    _stored: set[int] = field(default_factory=set)
    _tier: Tier | None = None

    def __post_init__(self) -> None:
        shape = self.layout.slots, 2, self.layout.half
        self._arena = torch.empty(shape, dtype=torch.uint8, device=self.device)

    @property
    def resident(self) -> int:
        """Bytes of the arena: what is in memory at most."""
        return self._arena.nbytes

    @property
    def order(self) -> list[int]:
        """The pages in the arena, the one to go first before the others."""
        return list(self._slots)

    def warm(self, order: Sequence[int]) -> None:
        """Fetch pages that were there before a stop; what is moved for it does not count."""
        for page in order[-self.layout.slots :]:
            self._bring(page)
        self.moved = Moved()

    @contextmanager
    def using(self, page: int, following: int | None) -> Iterator[Tensor]:
        """The page's halves [2, half], to be changed; the following page is fetched beside it, if there is room."""
        slot = self._bring(page)
        if following is not None and self.layout.slots > 1:
            self._bring(following, keep=page)
        self._slots.move_to_end(page)
        held = self._arena[slot]
        if self._tier is not None:
            self._tier.arrived(held)
        yield held
        self._dirty.add(page)

    def bytes_of(self, page: int) -> range:
        """The range of each moment's space that a page stands for."""
        start = page * self.layout.half
        return range(start, min(start + self.layout.half, self.layout.space))

    def flushed(self) -> Tensor:
        """All of both moments [2, space]: the arena itself if it holds everything, else the tier below."""
        if self.layout.whole:
            if 0 not in self._slots:
                self._bring(0)
            return self._arena[0][:, : self.layout.space]
        tier = self._below()
        for page in sorted(self._dirty):
            tier.write_back(self.bytes_of(page), self._arena[self._slots[page]])
            self._stored.add(page)
        self._dirty.clear()
        for page in set(range(self.layout.pages)) - self._stored:
            span = self.bytes_of(page)
            tier.store[:, span.start : span.stop].zero_()
        self._stored.update(range(self.layout.pages))
        tier.settle()
        return tier.store

    def forget(self) -> None:
        """What `flushed` gave was changed from outside: pages in the arena are fetched anew."""
        if not self.layout.whole:
            self._slots.clear()
            self._dirty.clear()

    def take_moved(self) -> Moved:
        """What was moved since the last call."""
        taken, self.moved = self.moved, Moved()
        return taken

    def _bring(self, page: int, keep: int | None = None) -> int:
        if page in self._slots:
            return self._slots[page]
        slot = len(self._slots)
        if slot == self.layout.slots:
            slot = self._evict(keep)
        self._slots[page] = slot
        if page in self._stored:
            self._below().fetch(self.bytes_of(page), self._arena[slot])
            self.moved.fetched += 1
        else:
            if self._tier is not None:
                self._tier.arrived(self._arena[slot])
            self._arena[slot].zero_()
        return slot

    def _evict(self, keep: int | None) -> int:
        oldest = next(page for page in self._slots if page != keep)
        slot = self._slots.pop(oldest)
        if oldest in self._dirty:
            self._below().write_back(self.bytes_of(oldest), self._arena[slot])
            self._dirty.discard(oldest)
            self._stored.add(oldest)
            self.moved.written += 1
        return slot

    def _below(self) -> Tier:
        if self._tier is None:
            self._tier = self.tier()
        return self._tier
