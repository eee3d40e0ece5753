"""Options from a YAML file: its keys are the options' names; what is typed wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from lorasurgery.plugins import suggestion


def use_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """Make the file's values the defaults of this command's options and arguments."""
    if file is not None:
        ctx.default_map = _values(ctx, file)
    return file


def _values(ctx: typer.Context, file: Path) -> dict[str, Any]:
    known = {p.name: p for p in ctx.command.params if p.name not in (None, "config", "help")}
    # --lambda's name in the program is another: it is a word of Python's
    known |= {
        flag[2:].replace("-", "_"): p for p in known.values() for flag in p.opts if flag[:2] == "--"
    }
    values: dict[str, Any] = {}
    for key, value in _mapping(file).items():
        parameter = known.get(str(key).replace("-", "_"))
        if parameter is None:
            names = sorted(str(name).replace("_", "-") for name in known)
            near = suggestion(str(key), names)
            raise typer.BadParameter(f"{file}: no option {str(key)!r}. {near}")
        many = getattr(parameter, "multiple", False) or parameter.nargs != 1
        values[str(parameter.name)] = _checked(file, key, value, many=many)
    return values


def _mapping(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(file.read_bytes())
    except OSError as error:
        raise typer.BadParameter(f"{file}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise typer.BadParameter(f"{file}: is no YAML ({reason}).") from None
    if not isinstance(loaded, dict | None):
        raise typer.BadParameter(f"{file}: holds a {type(loaded).__name__}, not options by name.")
    return loaded or {}


def _checked(file: Path, key: object, value: object, *, many: bool) -> object:
    """One value, or a list where the option may be repeated."""
    if many:
        value = value if isinstance(value, list) else [value]
    if isinstance(value, dict) or (isinstance(value, list) and not many) or value is None:
        raise typer.BadParameter(
            f"{file}: {key} is {value!r}; {'a list' if many else 'one value'} is wanted."
        )
    return [_typed(item) for item in value] if isinstance(value, list) else _typed(value)


def _typed(value: object) -> object:
    """As it would be typed: 5 for a size is as doubtful in a file as on the command line."""
    return value if isinstance(value, bool) else str(value)
