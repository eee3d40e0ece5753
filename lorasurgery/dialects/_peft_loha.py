"""LoHa as PEFT stores it.

Keys are base_model.model. + module path + .hada_w1_a [out, r], .hada_w1_b [r, in], .hada_w2_a, .hada_w2_b; of a
convolution with use_effective_conv2d .hada_t1 [r, r, *kernel], .hada_t2, and then .hada_w1_a is [r, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("loha",)

_KIND = form.Kind(
    "LOHA",
    {
        "hada_w1_a": "B1", "hada_w1_b": "A1", "hada_w2_a": "B2", "hada_w2_b": "A2",
        "hada_t1": "T1", "hada_t2": "T2",
    },
    frozenset({
        "r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout",
        "use_effective_conv2d", "init_weights",
    }),
)  # fmt: skip
_ENDS = {name: end for end, name in _KIND.factors.items()}


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks."""

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        core = {"T1", "T2"} if {"T1", "T2"} & keys.keys() else set()
        if problem := form.incomplete(module, keys, ["B1", "A1", "B2", "A2", *sorted(core)], _KIND):
            return problem
        said = form.site_config(config, module, "loha")
        infos = {name: _turned(name, info) if core else info for name, info in keys.items()}
        if not _fit(infos, said.rank):
            return form.unfit(module, keys, _KIND, said.rank)
        kernel = infos["T1"].shape[2:] if core else ()
        sides = (infos["B1"].shape[0], infos["A1"].shape[1] * math.prod(kernel))
        said = replace(said, extra={"kernel": kernel}) if core else said
        load = _reader(source, keys, turned=bool(core))
        facts = {name: TensorInfo(info.name, "F32", info.shape) for name, info in infos.items()}
        return [Site(module, "weight", "linear", said, facts, load, kernel, sides=sides)]

    return form.read(path, config, source, _KIND, sites)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks."""
    cores = any("T1" in site.factors for site in adapter.sites)
    fields = {**writing.ranks(adapter), "use_effective_conv2d": cores}
    writing.write(adapter, folder, _KIND, fields, _stored)


def _stored(site: Site) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    for name, info in site.factors.items():
        turned = "T1" in site.factors and name[0] == "B"
        yield _ENDS[name], *writing.factor(site, info, name, turned=turned)


def _turned(name: str, info: TensorInfo) -> TensorInfo:
    """B beside a core lies on its side."""
    return replace(info, shape=info.shape[::-1]) if name[0] == "B" else info


def _fit(infos: Mapping[str, TensorInfo], rank: int) -> bool:
    one, two = ([infos[f"{letter}{i}"].shape for letter in "BA"] for i in (1, 2))
    if one != two or any(len(shape) != 2 for shape in one):
        return False
    if "T1" in infos:
        cores = infos["T1"].shape, infos["T2"].shape
        if cores[0] != cores[1] or cores[0][:2] != (rank, rank):
            return False
    return one[0][1] == one[1][0] == rank


def _reader(
    source: Checkpoint, keys: form.Keys, *, turned: bool
) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        found = {name: form.loaded(source, info.name) for name, info in keys.items()}
        return {n: f.T.copy() if turned and n[0] == "B" else f for n, f in found.items()}

    return load
