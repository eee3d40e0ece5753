"""What a dialect for plain factors cannot say, collected first and refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorasurgery.adapter import Adapter
from lorasurgery.errors import FormatError


def check(
    adapter: Adapter, dialect: str, variants: Sequence[str], layouts: Sequence[str] = ("linear",),
    *, added: bool = False,
) -> None:  # fmt: skip
    """Raise FormatError if the adapter holds more than weights of these variants and layouts.

    added: vectors that are added can be said.
    """
    found = list(_unsayable(adapter, variants, layouts))
    found += [f"{name} is added" for name in adapter.added if not added]
    if found:
        more = f" ({len(found) - 1} more like it)" if found[1:] else ""
        raise FormatError(
            f"{adapter.path}: {found[0]}, which {dialect} cannot say{more}. Merge it, convert it, or "
            "write another dialect."
        )


def joined(adapter: Adapter, dialect: str) -> None:
    """Raise FormatError for kohya's names, which no other dialect understands."""
    if adapter.dialect == "kohya":
        raise FormatError(
            f"{adapter.path}: the names of its modules have _ for ., and {dialect} needs them as the "
            "model has them. Give the base."
        )


def _unsayable(adapter: Adapter, variants: Sequence[str], layouts: Sequence[str]) -> Iterator[str]:
    for site in adapter.sites:
        if site.config.variant not in variants:
            yield f"{site.module} is a {site.config.variant}"
        elif site.layout not in layouts:
            yield f"{site.module}.{site.parameter} is adapted as {_article(site.layout)}"
        elif site.parameter != "weight":
            yield f"{site.module}.{site.parameter} is adapted, which is no weight"
    for name in adapter.replaced:
        yield f"{name} is replaced as a whole"


def _article(layout: str) -> str:
    return f"an {layout}" if layout[0] == "e" else f"a {layout}"
