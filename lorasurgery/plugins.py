"""A folder is a registry: the file adapters/lora.py is the variant 'lora'. Nothing else lists it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from functools import cache
from types import ModuleType

from lorasurgery.errors import UnknownNameError


def names(kind: str) -> list[str]:
    """The names of one kind ('adapters', 'codecs', 'formats', 'kernels', 'cli'); imports none."""
    return list(_listed(kind))


@cache  # a listing takes a millisecond, and one adapter asks for five
def _listed(kind: str) -> tuple[str, ...]:
    folder = importlib.import_module(f"lorasurgery.{kind}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if m.name[0] != "_"))


def load(kind: str, name: str) -> ModuleType:
    """Import the module that goes by this name, or say which names there are."""
    path = f"lorasurgery.{kind}.{name}"
    if path in sys.modules and not name.startswith("_"):
        return sys.modules[path]  # the folder need not be listed once more
    known = names(kind)
    if name not in known:
        raise UnknownNameError(f"{kind}: no {name!r}. {suggestion(name, known)}")
    return importlib.import_module(path)


def suggestion(name: str, known: list[str]) -> str:
    """A sentence that names the nearest known name, or some of them."""
    if near := difflib.get_close_matches(name, known, n=1, cutoff=0.5):
        return f"Did you mean {near[0]!r}?"
    return f"Known: {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}."
