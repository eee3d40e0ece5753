"""VeRA as PEFT stores it.

Keys are base_model.model. + module path + .vera_lambda_b [out], .vera_lambda_d [r], and once base_model.vera_A
[r, max_in], base_model.vera_B [max_out, r]: as wide as the widest module. With save_projection false these
two are drawn again from projection_prng_key, by torch's generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, BaseFacts, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_vera_write
from lorasurgery.errors import MatchError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("vera",)
KIND = _peft_vera_write.KIND
SHARED = _peft_vera_write.SHARED


_Load = Callable[[int, int], tuple["Array", "Array"]]


def _projections(
    path: Path,
    stored: Mapping[str, Callable[[], Array]],
    drawn: tuple[int, int],
    source: Checkpoint,
) -> _Load:
    """What gives A and B once for all modules: stored, or drawn for the widest by (rank, key).

    Raises MatchError where they are not those that the vectors were trained with.
    """

    @cache
    def load(max_in: int, max_out: int) -> tuple[Array, Array]:
        if stored:
            a, b = stored["A"](), stored["B"]()
        elif max_in:
            a, b = _drawn(*drawn, max_in, max_out)
        else:
            raise MatchError(
                f"{path}: its projections are drawn for the widest module, which only the base tells. "
                "Name a base that has all of its modules."
            )
        for name, matrix in (("A", a), ("B", b)):
            noted = source.metadata.get(f"vera_{name}.sha256")
            found = hashlib.sha256(matrix.tobytes()).hexdigest()
            if noted and noted != found:
                raise MatchError(
                    f"{path}: vera_{name} has sha256 {found[:12]}, but {noted[:12]} was noted when it "
                    "was written. Name the base that it was trained on, or store the projections."
                )
        return a, b

    return load


def _drawn(rank: int, key: int, max_in: int, max_out: int) -> tuple[Array, Array]:
    """By torch's generator, whose stream PEFT relies on."""
    import torch

    rng = torch.Generator(device="cpu").manual_seed(key)
    a, b = plugins.load("adapters", "vera").projections(rank, max_in, max_out, rng)
    return a.numpy(), b.numpy()


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks. How many of A's columns a module takes, only its weight tells."""
    named = {name: key for name, key in SHARED.items() if key in source}
    stored = {name: _loader(source, key) for name, key in named.items()}
    rank = int(config.get("r", 256))
    drawn = config.get("projection_prng_key")
    problems = []
    if len(named) == 1 or (not named and not isinstance(drawn, int)):
        problems.append(
            Problem(
                "base_model.vera_A", "base_model.vera_A and vera_B are missing, and no key is said"
            )
        )
    both = stored if len(stored) == 2 else {}
    shared = _projections(path, both, (rank, drawn or 0), source)

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        if problem := form.incomplete(module, keys, "bd", KIND):
            return problem
        if len(keys["b"].shape) != 1 or keys["d"].shape != (rank,):
            return form.unfit(module, keys, KIND, rank)
        wide = source.info(SHARED["B"]).shape if "B" in named else keys["b"].shape
        if wide[0] < keys["b"].shape[0]:
            return Problem(
                keys["b"].name,
                f"{module}: vera_B is {list(wide)}, but vera_lambda_b has {keys['b'].shape[0]} rows",
            )
        facts = {name: TensorInfo(info.name, "F32", info.shape) for name, info in keys.items()}
        facts["B"] = TensorInfo(SHARED["B"], "F32", (*keys["b"].shape, rank))
        said = AdapterConfig("vera", rank, float(rank))
        turned = bool(config.get("fan_in_fan_out"))
        return [
            Site(
                module, "weight", "linear", said, facts, _incomplete(path, module),
                fan_in_fan_out=turned, sides=(keys["b"].shape[0], None),
            )
        ]  # fmt: skip

    adapter = form.read(path, config, _Without(source), KIND, sites)
    adapter = replace(adapter, problems=(*adapter.problems, *problems))

    def complete(base: BaseFacts) -> Adapter:
        names = [f"{site.module}.weight" for site in adapter.sites]
        return _complete(adapter, source, shared, base.shapes(names))

    return replace(adapter, complete=complete)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks."""
    _peft_vera_write.write(adapter, folder)


def _complete(
    adapter: Adapter,
    source: Checkpoint,
    shared: _Load,
    shapes: Mapping[str, tuple[int, ...]],
) -> Adapter:
    widths = {}
    for site in adapter.sites:
        shape, out = shapes.get(f"{site.module}.weight"), site.factors["b"].shape[0]
        if shape and len(shape) == 2:
            widths[site.module] = shape[1] if shape[0] == out else shape[0]
    # drawn numbers depend on every width
    largest = max(widths.values()) if len(widths) == len(adapter.sites) > 0 else 0
    most = max((site.factors["b"].shape[0] for site in adapter.sites), default=0)
    if SHARED["A"] in source:
        largest = source.info(SHARED["A"]).shape[1]

    def full(site: Site) -> Site:
        width = min(widths.get(site.module, largest), largest or max(widths.values(), default=0))
        facts = {**site.factors, "A": TensorInfo(SHARED["A"], "F32", (site.config.rank, width))}
        out = site.factors["b"].shape[0]

        def load() -> dict[str, Array]:
            a, b = shared(largest, most)
            vectors = {n: form.loaded(source, site.factors[n].name) for n in "bd"}
            return {"A": a[:, :width], "B": b[:out], **vectors}

        said = replace(site.config, extra={"projections": lambda: shared(largest, most)})
        return replace(site, config=said, factors=facts, load=load, sides=(out, width))

    return replace(adapter, sites=tuple(map(full, adapter.sites)), complete=None)


def _loader(source: Checkpoint, key: str) -> Callable[[], Array]:
    return lambda: form.loaded(source, key)


def _incomplete(path: Path, module: str) -> Callable[[], Mapping[str, Array]]:
    def load() -> Mapping[str, Array]:
        raise MatchError(
            f"{path}: how many columns of vera_A {module} takes, only its weight tells. Name the base."
        )

    return load


class _Without:
    """The file without the shared projections, which belong to no module."""

    def __init__(self, source: Checkpoint) -> None:
        self._source, self.path, self.metadata = source, source.path, source.metadata
        self.info, self.read, self.release = source.info, source.read, source.release
        self.place, self.storage = source.place, source.storage

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._source if key not in SHARED.values())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, key: object) -> bool:
        return key in self._source and key not in SHARED.values()
