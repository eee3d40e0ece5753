"""LoKr as PEFT stores it: of each part, by its size, the matrix or two factors.

Keys are base_model.model. + module path + .lokr_w1 [a, b], or .lokr_w1_a [a, r] and .lokr_w1_b [r, b]; .lokr_w2
[c, d, *kernel], or .lokr_w2_a [c, r] and .lokr_w2_b [r, d]; of a convolution with use_effective_conv2d also
.lokr_t2 [r, r, *kernel], and then .lokr_w2_a is [r, c].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lokr",)

_KIND = form.Kind(
    "LOKR",
    {
        "lokr_w1": "W1", "lokr_w1_a": "W1A", "lokr_w1_b": "W1B", "lokr_w2": "W2",
        "lokr_w2_a": "W2A", "lokr_w2_b": "W2B", "lokr_t2": "T2",
    },
    frozenset({
        "r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout",
        "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor",
        "init_weights",
    }),
)  # fmt: skip
_ENDS = {name: end for end, name in _KIND.factors.items()}
# how PEFT splits the sizes of W
_SPLIT = ("decompose_factor", "decompose_both")


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks."""
    how = {name: config[name] for name in _SPLIT if name in config}

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        wanted = [n for w in ("W1", "W2") for n in ((w,) if w in keys else (f"{w}A", f"{w}B"))]
        if problem := form.incomplete(module, keys, wanted, _KIND):
            return problem
        said = form.site_config(config, module, "lokr")
        infos = {n: _turned(info) if _lies(n, keys) else info for n, info in keys.items()}
        if not _fit(infos, said.rank):
            return form.unfit(module, keys, _KIND, said.rank)
        conv1d = {"last_dimensions": True} if "W2" in infos and len(infos["W2"].shape) == 3 else {}
        said = replace(said, extra={**how, **conv1d})
        facts = {name: TensorInfo(info.name, "F32", info.shape) for name, info in infos.items()}
        kernel = infos["T2"].shape[2:] if "T2" in infos else ()
        kernel = infos["W2"].shape[2:] if "W2" in infos else kernel
        load = _reader(source, keys)
        return [Site(module, "weight", "linear", said, facts, load, kernel, sides=_sides(infos))]

    return form.read(path, config, source, _KIND, sites)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks. Raises FormatError for parts of sizes that PEFT would not choose."""
    cores = any("T2" in site.factors for site in adapter.sites)
    fields = {**writing.ranks(adapter), **_split(adapter), "use_effective_conv2d": cores}
    writing.write(adapter, folder, _KIND, fields, _stored)


def _split(adapter: Adapter) -> dict[str, Any]:
    """The decompose_factor and decompose_both with which PEFT makes these shapes."""
    if all(_SPLIT[0] in site.config.extra for site in adapter.sites):
        return {
            name: writing.one_of_all(adapter, name, otherwise)
            for name, otherwise in zip(_SPLIT, (-1, False), strict=True)
        }
    sizes = {n for site in adapter.sites for n in _part(site.factors, "W1")}
    for factor, both in product((-1, *sorted(sizes)), (False, True)):
        if all(_makes(site, factor, both=both) for site in adapter.sites):
            return {"decompose_factor": factor, "decompose_both": both}
    raise FormatError(
        f"{adapter.path}: no decompose_factor of PEFT's LoKr makes parts of these sizes. Convert it to "
        "LoRA."
    )


def _makes(site: Site, factor: int, *, both: bool) -> bool:
    config = AdapterConfig(
        "lokr", site.config.rank, 1.0, extra={_SPLIT[0]: factor, _SPLIT[1]: both}
    )
    out, in_ = _sides(site.factors)
    made = plugins.load("adapters", "lokr").shapes(out, in_, config)
    return bool(made == {name: info.shape for name, info in site.factors.items()})


def _stored(site: Site) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    for name, info in site.factors.items():
        yield _ENDS[name], *writing.factor(site, info, name, turned=_lies(name, site.factors))


def _lies(name: str, names: Mapping[str, TensorInfo]) -> bool:
    """Whether a factor lies on its side in the file: W2A beside a core."""
    return name == "W2A" and "T2" in names


def _turned(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.shape[::-1])


def _part(infos: Mapping[str, TensorInfo], part: str) -> tuple[int, int]:
    """Rows and columns of W1 or W2, a convolution's flat."""
    if part in infos:
        shape = infos[part].shape
        return shape[0], math.prod(shape[1:])
    kernel = infos["T2"].shape[2:] if part == "W2" and "T2" in infos else ()
    return infos[f"{part}A"].shape[0], infos[f"{part}B"].shape[1] * math.prod(kernel)


def _sides(infos: Mapping[str, TensorInfo]) -> tuple[int, int]:
    one, two = _part(infos, "W1"), _part(infos, "W2")
    return one[0] * two[0], one[1] * two[1]


def _fit(infos: Mapping[str, TensorInfo], rank: int) -> bool:
    if any(len(infos[n].shape) != 2 for n in infos if n not in ("W2", "T2")):
        return False
    pairs = [(infos[f"{w}A"], infos[f"{w}B"]) for w in ("W1", "W2") if f"{w}A" in infos]
    if "T2" in infos and infos["T2"].shape[:2] != (rank, rank):
        return False
    whole = "W2" not in infos or len(infos["W2"].shape) in (2, 3, 4)
    return whole and all(a.shape[1] == b.shape[0] == rank for a, b in pairs)


def _reader(source: Checkpoint, keys: form.Keys) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        found = {name: form.loaded(source, info.name) for name, info in keys.items()}
        return {n: f.T.copy() if _lies(n, keys) else f for n, f in found.items()}

    return load
