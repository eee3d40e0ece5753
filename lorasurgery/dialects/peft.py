"""PEFT: a directory with adapter_config.json and adapter_model.safetensors (or .bin).

Each of PEFT's types has a form of its own: its keys, its config. The form of type LOHA is in
_peft_loha.py, and that file is all that knows of it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from lorasurgery import dialects
from lorasurgery.adapter import Adapter
from lorasurgery.checkpoint import Checkpoint, open_file, read_json
from lorasurgery.dialects import _peft_other_types, _sayable
from lorasurgery.dialects._peft_types_refused import REFUSED
from lorasurgery.errors import FormatError, MatchError, UnknownNameError

CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")


class Form(Protocol):
    """What a module _peft_TYPE offers."""

    @property
    def VARIANTS(self) -> tuple[str, ...]:
        """The variants that this type holds."""
        ...

    def read(self, path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
        """The adapter's sites and whole tensors; headers alone, factors are read when a site loads.

        Raises FormatError or MatchError for what no flag can allow; what may be left out is in
        `problems`.
        """
        ...

    def write(self, adapter: Adapter, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors into an empty directory."""
        ...


def _forms() -> dict[str, str]:
    """PEFT's types that are known: LORA -> the module's name."""
    names = [m.name for m in pkgutil.iter_modules(dialects.__path__)]
    return {
        name.removeprefix("_peft_").upper(): name
        for name in names
        if name.startswith("_peft_") and name.count("_") == 2
    }


def _form(module: str) -> Form:
    return cast(Form, importlib.import_module(f"lorasurgery.dialects.{module}"))


def detect(path: Path) -> bool:
    """A directory with PEFT's config in it."""
    return (path / CONFIG).is_file()


def read(path: Path) -> Adapter:
    """The adapter, whatever its type. Raises UnknownNameError for a type that has no form here."""
    config = read_json(path / CONFIG)
    kind = str(config.get("peft_type") or "LORA").upper()
    known = _forms()
    if kind in REFUSED:
        raise MatchError(f"{path / CONFIG}: {kind} {REFUSED[kind]}.")
    if kind in _peft_other_types.TYPES:
        return _peft_other_types.read(path, config, _weights(path))
    if kind not in known:
        raise UnknownNameError(
            f"{path / CONFIG}: peft_type {kind!r} is no variant that is read here. Known: "
            f"{', '.join(sorted({*known, *_peft_other_types.TYPES}))}."
        )
    return _form(known[kind]).read(path, config, _weights(path))


def write(adapter: Adapter, folder: Path) -> None:
    """The adapter in the form that holds all of its sites. Raises FormatError where there is none."""
    _sayable.joined(adapter, "PEFT")
    wanted = {site.config.variant for site in adapter.sites}
    kind = str(adapter.settings.get("peft_type")) if adapter.dialect == "peft" else ""
    bare = not wanted and kind in _peft_other_types.TYPES
    if bare or wanted == set(_peft_other_types.VARIANTS):
        _peft_other_types.write(adapter, folder)
        return
    for module in _forms().values():
        if wanted <= set(_form(module).VARIANTS):
            _form(module).write(adapter, folder)
            return
    raise FormatError(
        f"{adapter.path}: PEFT has no one layout for {', '.join(sorted(wanted))}. Convert it to one of "
        f"{', '.join(VARIANTS)}."
    )


def _weights(path: Path) -> Checkpoint:
    for name in _FILES:
        if (path / name).is_file():
            return open_file(path / name)
    raise FormatError(f"{path}: {CONFIG} stands alone. {_FILES[0]} is missing; restore it.")


VARIANTS = (
    *(v for module in _forms().values() for v in _form(module).VARIANTS),
    *_peft_other_types.VARIANTS,
)
