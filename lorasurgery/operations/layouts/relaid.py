"""An adapter whose modules are others than it came with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorasurgery.adapter import Adapter, Site


@dataclass(frozen=True, slots=True)
class Relaid:
    """The adapter in another layout, which site each of its sites came of, and what was done."""

    adapter: Adapter
    origins: tuple[Site, ...]
    notes: tuple[str, ...]

    def then(self, work: Callable[[Adapter], Relaid]) -> Relaid:
        """One more layout after this one."""
        made = work(self.adapter)
        by = {id(new): old for new, old in zip(self.adapter.sites, self.origins, strict=True)}
        origins = tuple(by[id(site)] for site in made.origins)
        return Relaid(made.adapter, origins, (*self.notes, *made.notes))
