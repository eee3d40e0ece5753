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
            flag = typer.Option(help=text, show_default=str(own.default))
            kind: Any = hints[own.name] | None
            found.setdefault(own.name, (own.name, Annotated[kind, flag], field(default=None)))
    return make_dataclass("MethodFlags", list(found.values()), frozen=True)


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
            raise UsageError(
                f"--{key.replace('_', '-')}: means nothing to {name}. It belongs to {', '.join(owners)}."
            )
    return options(**given)
