"""The flags that one method of training has and others have not, gathered from the files in methods/."""

from __future__ import annotations

from dataclasses import field, fields, make_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from lorasurgery.errors import UsageError
from lorasurgery.training import method


def _gathered() -> type[Any]:
    """A dataclass with a field for each method's option; None: it was not given."""
    found: dict[str, Any] = {}
    for name in method.names():
        options = method.load(name).Options
        hints = get_type_hints(options)
        for own in fields(options):
            text = f"{name}: {own.metadata['help']}"
            typed = own.metadata.get("flags", ())
            shown = False if own.default is None else str(own.default)
            flag = typer.Option(*typed, help=text, show_default=shown)
            kind: Any = hints[own.name] | None
            found.setdefault(own.name, (own.name, Annotated[kind, flag], field(default=None)))
    return make_dataclass("MethodFlags", list(found.values()), frozen=True)


def flag_of(own: Any) -> str:
    """How a method's option is typed."""
    flags: tuple[str, ...] = own.metadata.get("flags", (f"--{own.name.replace('_', '-')}",))
    return flags[0]


MethodFlags: Any = _gathered()


def own_options(name: str, flags: Any) -> Any:
    """The method's Options with what was given. Raises UsageError for another method's flag."""
    options = method.load(name).Options
    given = {f.name: getattr(flags, f.name) for f in fields(flags)}
    given = {key: value for key, value in given.items() if value is not None}
    known = {f.name for f in fields(options)}
    for key in given:
        if key not in known:
            owners = [
                n for n in method.names() if key in {f.name for f in fields(method.load(n).Options)}
            ]
            flag = next(
                flag_of(f) for n in owners for f in fields(method.load(n).Options) if f.name == key
            )
            raise UsageError(f"{flag}: means nothing to {name}. It belongs to {', '.join(owners)}.")
    return options(**given)
