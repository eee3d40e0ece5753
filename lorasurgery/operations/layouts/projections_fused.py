"""LoRAs of q, k and v, or of gate and up, as one of the fused projection.

Where all A are equal, A is kept and B's rows are put together, at the same rank. Where not, A = [A₁; A₂; ...] and B
is block-diagonal, of the sum of the ranks. Either is exact; parts that have no factors get zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.operations.layouts.fused_rows import TABLE, Fused, Rows, by_part, rows
from lorasurgery.operations.layouts.projections_split import (
    check_plain,
    is_plain,
    known_rows,
    nothing_to_do,
)
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.operations.layouts.wholes_of_rows import fused_wholes
from lorasurgery.tensors import TensorInfo

_FUSES = ("lora", "dora")
# one of several, whose projections are put together by --experts stacked
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Group:
    """The modules below one path that one fused module stands for, as far as they are adapted."""

    owner: str
    fused: Fused
    rows: Rows
    sites: Mapping[str, Site]  # by the part's name

    @property
    def module(self) -> str:
        return f"{self.owner}{self.fused.name}"


def fuse(adapter: Adapter, config: Mapping[str, Any]) -> Relaid:
    """Raises MatchError where the rows are not known, and where no modules belong together."""
    groups = _groups(adapter, config)
    if not groups:
        raise nothing_to_do(adapter, "a part", [p for f in TABLE[-2:] for p in f.parts])
    made, origins, shared = list[Site](), list[Site](), 0
    by = {id(site): group for group in groups for site in group.sites.values()}
    for site in adapter.sites:
        group = by.get(id(site))
        if group is None:
            made.append(site)
        elif site is next(iter(group.sites.values())):
            joined, same = _joined(group)
            shared += same
            made.append(joined)
        else:
            continue
        origins.append(site)
    note = (
        f"{len(groups)} fused projections: {shared} at the rank of their parts, whose A are equal"
    )
    if shared < len(groups):
        note += f"; {len(groups) - shared} at the sum of their ranks"
    whole = fused_wholes(replace(adapter, sites=tuple(made)), groups)
    return Relaid(whole, tuple(origins), (note,))


def _groups(adapter: Adapter, config: Mapping[str, Any]) -> list[Group]:
    found: dict[tuple[str, Fused], dict[str, Site]] = {}
    for site in adapter.sites:
        last = site.module.rpartition(".")[2]
        fused = by_part(last, config)
        check_plain(adapter, site, known=fused is not None)
        if fused is not None and is_plain(site) and not _EXPERT.search(site.module):
            found.setdefault((site.module.removesuffix(last), fused), {})[last] = site
    return [_group(adapter, config, owner, fused, s) for (owner, fused), s in found.items()]


def _group(
    adapter: Adapter, config: Mapping[str, Any], owner: str, fused: Fused, sites: dict[str, Site]
) -> Group:
    module = f"{owner}{fused.name}"
    for site in sites.values():
        if site.config.variant not in _FUSES:
            raise MatchError(
                f"{adapter.path}: {site.module} is a {site.config.variant}, and lora and dora alone are put "
                "together. Convert it first: lorasurgery convert --to lora."
            )
        if site.config.variant == "dora" and len(sites) < len(fused.parts):
            missing = ", ".join(p for p in fused.parts if p not in sites)
            raise MatchError(
                f"{adapter.path}: {module} would be a dora, but {missing} beside {site.module} has no "
                "magnitudes. Convert it first: lorasurgery convert --to lora."
            )
    sizes = {site.size for site in sites.values()}
    if len({in_ for _, in_ in sizes}) > 1 or len({s.config.variant for s in sites.values()}) > 1:
        raise MatchError(
            f"{adapter.path}: the parts of {module} are not of one variant and one width, so that they are "
            "no parts of one projection. Leave the layout as it is."
        )
    halves = fused.order == "halves"
    total = 2 * next(iter(sites.values())).factors["B"].shape[0] if halves else None
    lie = _given_rows(fused, sites, config) or known_rows(adapter, fused, config, module, total)
    for i, part in enumerate(fused.parts):
        if part in sites and sites[part].size[0] != lie.count(i):
            raise MatchError(
                f"{adapter.path}: {sites[part].module} has {sites[part].size[0]} rows, but by the base's "
                f"config.json {lie.count(i)}. Check --base."
            )
    return Group(owner, fused, lie, {p: sites[p] for p in fused.parts if p in sites})


def _given_rows(fused: Fused, sites: Mapping[str, Site], config: Mapping[str, Any]) -> Rows | None:
    """Of parts one after another that are all there: their own sizes, where no config says otherwise."""
    if fused.order != "blocks" or len(sites) < len(fused.parts) or rows(fused, config) is not None:
        return None
    return Rows(1, tuple(sites[p].size[0] or 0 for p in fused.parts))


def _joined(group: Group) -> tuple[Site, bool]:
    """The fused site, and whether its parts share A."""
    first = next(iter(group.sites.values()))
    configs = {
        (c.rank, c.alpha, c.rank_stabilized) for c in (s.config for s in group.sites.values())
    }
    held = [site.load()["A"] for site in group.sites.values()]
    shared = all(np.array_equal(a, held[0]) for a in held)
    ranks = [len(a) for a in held]
    rank = ranks[0] if shared else sum(ranks)
    config = _config(first.config, len(ranks), rank, shared=shared, same=len(configs) == 1)
    baked = config is None
    config = config or unscaled(first.config, rank)
    facts = {
        "A": TensorInfo("A", "F32", (rank, held[0].shape[1])),
        "B": TensorInfo("B", "F32", (group.rows.total, rank)),
    }
    if first.config.variant == "dora":
        facts["m"] = TensorInfo("m", "F32", (group.rows.total, 1))
    load = _loader(group, shared=shared, baked=baked)
    made = replace(first, module=group.module, config=config, factors=facts, load=load)
    return made, shared


def unscaled(config: AdapterConfig, rank: int) -> AdapterConfig:
    """One of scaling 1, which goes into a file beside others of the same kind."""
    alpha = math.sqrt(rank) if config.rank_stabilized else float(rank)
    return AdapterConfig(config.variant, rank, alpha, config.rank_stabilized)


def _config(
    config: AdapterConfig, parts: int, rank: int, *, shared: bool, same: bool
) -> AdapterConfig | None:
    """One that scales as those of all parts do, to the last bit; None if there is none."""
    if not same or (config.rank_stabilized and not shared):
        return None
    return config if shared else replace(config, rank=rank, alpha=config.alpha * parts)


def _loader(group: Group, *, shared: bool, baked: bool) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        found = {part: dict(site.load()) for part, site in group.sites.items()}
        ranks = [len(f["A"]) for f in found.values()]
        rank = ranks[0] if shared else sum(ranks)
        b = np.zeros((group.rows.total, rank), np.float32)
        made, column = {"B": b}, 0
        for i, part in enumerate(group.fused.parts):
            if part not in found:
                continue
            factors, index = found[part], group.rows.of(i)
            scale = np.float32(group.sites[part].config.scaling) if baked else np.float32(1)
            at = 0 if shared else column
            b[index, at : at + len(factors["A"])] = factors["B"] * scale
            column += len(factors["A"])
            if "m" in factors:
                made.setdefault("m", np.zeros((len(b), 1), np.float32))[index] = factors["m"]
        stack = [f["A"] for f in found.values()]
        return {"A": stack[0] if shared else np.concatenate(stack), **made}

    return load
