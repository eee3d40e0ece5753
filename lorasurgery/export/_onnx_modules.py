"""An ONNX file seen as the model that it was exported from: weights [out, in], by their modules' names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorasurgery.errors import FormatError, MatchError
from lorasurgery.export._onnx_linear import Linear, called, linears
from lorasurgery.formats.onnx import File
from lorasurgery.model import Model
from lorasurgery.plugins import suggestion
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import Weights

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


class Modules:
    """A checkpoint of a graph's linear weights as MODULE.weight, and of its other initializers."""

    def __init__(self, file: File, found: list[Linear]) -> None:
        self.file, self.path = file, file.path
        self.metadata: Mapping[str, str] = file.metadata
        self.linears = {f"{linear.module}.weight": linear for linear in found}
        used_up = {li.initializer for li in found} - {
            li.initializer for li in found if li.elsewhere
        }
        self._others = {
            (f"{name}@table" if name in self.linears else name): name
            for name in file
            if name not in used_up
        }

    def __iter__(self) -> Iterator[str]:
        yield from self.linears
        yield from self._others

    def __len__(self) -> int:
        return len(self.linears) + len(self._others)

    def __contains__(self, name: object) -> bool:
        return name in self.linears or name in self._others

    def info(self, name: str) -> TensorInfo:
        linear = self.linears.get(name)
        stored = self.file.info(self._stored(name))
        return replace(stored, name=name, shape=linear.shape if linear else stored.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        linear = self.linears.get(name)
        if linear is None or not linear.turned:
            return self.file.read(self._stored(name), start, stop)
        rows: Array = self.file.read(linear.initializer).T[start:stop].copy()
        return rows

    def release(self, name: str) -> None:
        self.file.release(self._stored(name))

    def place(self, name: str) -> tuple[Path, int] | None:
        linear = self.linears.get(name)
        return None if linear and linear.turned else self.file.place(self._stored(name))

    def storage(self, name: str) -> tuple[str, int]:
        return self.file.storage(self._stored(name))

    def _stored(self, name: str) -> str:
        linear = self.linears.get(name)
        return linear.initializer if linear else self._others[name]


def open_modules(file: File, given: Mapping[str, str]) -> tuple[Model, Modules]:
    """The view, some modules named by hand: to an initializer's or a node's name."""
    view = Modules(file, _named(file, given))
    return Model(file.path, view, Weights(view), {}), view


def read_map(path: Path) -> dict[str, str]:
    """A YAML or JSON file of module: initializer or node."""
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror}. Check the path.") from None
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise FormatError(
            f"{path}: is no YAML of `module: initializer or node`, one a line. Mend the file."
        )
    return {str(module): name for module, name in content.items()}


def _named(file: File, given: Mapping[str, str]) -> list[Linear]:
    found = linears(file.header)
    names = [called(file.header, linear) for linear in found]
    for module, name in given.items():
        at = [i for i, of in enumerate(names) if name in of]
        if len(at) != 1:
            known = sorted(n for of in names for n in of if n)
            what = f"{len(at)} weights go" if at else "no weight goes"
            raise MatchError(
                f"{file.path}: --map {module}: {what} by the name {name!r}. {suggestion(name, known)}"
            )
        found[at[0]] = replace(found[at[0]], module=module)
    return found
