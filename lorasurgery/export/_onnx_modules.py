"""An ONNX file seen as the model that it was exported from: weights [out, in], by their modules' names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lorasurgery.errors import FormatError, MatchError
from lorasurgery.export._onnx_bias import biases
from lorasurgery.export._onnx_linear import Linear, Users, called, linears
from lorasurgery.formats.onnx import File
from lorasurgery.model import Model
from lorasurgery.plugins import suggestion
from lorasurgery.tensors import TensorInfo
from lorasurgery.weights import Weights

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the view lies: its initializer, and (node, input) of those that are its own.

    `turned`: it is seen transposed. `alone`: nothing else of the graph uses the initializer.
    """

    initializer: str
    shape: tuple[int, ...]
    inputs: tuple[tuple[int, int], ...]
    alone: bool
    turned: bool = False


class Modules:
    """A checkpoint of a graph's linear weights and biases as MODULE.weight, and of its other initializers."""

    def __init__(self, file: File, found: list[Linear]) -> None:
        self.file, self.path = file, file.path
        self.metadata: Mapping[str, str] = file.metadata
        self.linears = {f"{linear.module}.weight": linear for linear in found}
        users = Users(file.header)
        self.places = {
            name: Place(li.initializer, li.shape, tuple((n, 1) for n in li.nodes), li.alone, li.turned)
            for name, li in self.linears.items()
        }  # fmt: skip
        for bias in biases(file.header, users, found):
            place = Place(bias.initializer, (bias.size,), bias.inputs, bias.alone)
            self.places.setdefault(f"{bias.module}.bias", place)
        self.places |= self._others(users)

    def _others(self, users: Users) -> dict[str, Place]:
        """What is no product's, or something else's as well."""
        known: dict[str, set[int]] = defaultdict(set)
        for place in self.places.values():
            known[place.initializer].update(node for node, _ in place.inputs)
        made = {}
        for name in self.file:
            leaves = users.leaves(name)
            if name in known and leaves <= known[name]:
                continue
            alone = name not in known and len(leaves) < 2 and -1 not in leaves
            shown = f"{name}@table" if name in self.places else name
            made[shown] = Place(name, self.file.info(name).shape, (), alone)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def info(self, name: str) -> TensorInfo:
        place = self.places[name]
        return replace(self.file.info(place.initializer), name=name, shape=place.shape)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Array:
        place = self.places[name]
        if not place.turned:
            return self.file.read(place.initializer, start, stop)
        rows: Array = self.file.read(place.initializer).T[start:stop].copy()
        return rows

    def release(self, name: str) -> None:
        self.file.release(self.places[name].initializer)

    def place(self, name: str) -> tuple[Path, int] | None:
        place = self.places[name]
        return None if place.turned else self.file.place(place.initializer)

    def storage(self, name: str) -> tuple[str, int]:
        return self.file.storage(self.places[name].initializer)


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
