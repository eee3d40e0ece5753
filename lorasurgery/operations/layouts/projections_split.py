"""A LoRA of a fused projection as LoRAs of its parts: qkv -> q, k, v; gate_up -> gate, up.

A is shared and B's rows are dealt out, so that nothing is lost and no rank grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.operations.algebra.made import variant_of
from lorasurgery.operations.layouts.fused_rows import TABLE, Fused, Rows, by_name, rows
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.operations.layouts.wholes_of_rows import split_wholes

# of the variants whose change goes row by row, those that share nothing with other modules
_BY_ROWS = ("lora", "dora", "adalora", "lora_rowscale")


def split(adapter: Adapter, config: Mapping[str, Any]) -> Relaid:
    """Raises MatchError where the rows are not known, for a variant that is no sum over rows, and where nothing is fused."""
    found: list[tuple[Site, Site]] = []
    splits: dict[str, tuple[Fused, Rows]] = {}
    for site in adapter.sites:
        fused = _fused(adapter, site, config)
        if fused is None:
            found.append((site, site))
            continue
        check_rows(adapter, site)
        lie = known_rows(adapter, fused, config, site.module, site.size[0])
        splits[site.module] = (fused, lie)
        owner = site.module.removesuffix(fused.name)
        for i, part in enumerate(fused.parts):
            found.append((of_rows(site, f"{owner}{part}", lie.of(i)), site))
    if not splits:
        raise nothing_to_do(adapter, "fused", [f.name for f in TABLE])
    made = replace(adapter, sites=tuple(new for new, _ in found))
    note = f"{len(splits)} fused projections are written as their parts, which share A"
    return Relaid(split_wholes(made, splits), tuple(old for _, old in found), (note,))


def _fused(adapter: Adapter, site: Site, config: Mapping[str, Any]) -> Fused | None:
    fused = by_name(site.module.rpartition(".")[2], config)
    check_plain(adapter, site, known=fused is not None)
    return fused if is_plain(site) else None


def is_plain(site: Site) -> bool:
    """Whether it is a matrix, whose rows can go elsewhere."""
    return site.layout == "linear" and not site.kernel and site.parameter == "weight"


def check_plain(adapter: Adapter, site: Site, *, known: bool) -> None:
    """Raises MatchError for a change of a bias of such a projection, which would be left behind."""
    if known and site.parameter == "bias":
        raise MatchError(
            f"{adapter.path}: {site.module}.bias is adapted by itself, and matrices alone change their layout. "
            "Merge it."
        )


def check_rows(adapter: Adapter, site: Site) -> None:
    """Raises MatchError for a variant whose change of some rows is not of the same kind by itself."""
    names = getattr(variant_of(site), "ROWS", ())
    out = site.size[0]
    known = site.config.variant in _BY_ROWS
    if not known or any(site.factors[n].shape[0] != out for n in names):
        raise MatchError(
            f"{adapter.path}: {site.module} is a {site.config.variant}, whose change does not fall apart by "
            "rows. Convert it first: lorasurgery convert --to lora."
        )


def known_rows(
    adapter: Adapter, fused: Fused, config: Mapping[str, Any], module: str, out: int | None
) -> Rows:
    """How the rows of a fused module lie; raises MatchError where nobody says, and for another number of them."""
    lie = rows(fused, config, out)
    if lie is None:
        raise MatchError(
            f"{adapter.path}: how many rows of {module} are whose follows from the base's config.json "
            "(heads and their size). Pass --base DIR."
        )
    if out is not None and lie.total != out:
        said = " + ".join(str(lie.count(i)) for i in range(len(fused.parts)))
        raise MatchError(
            f"{adapter.path}: {module} has {out} rows, but by the base's config.json {', '.join(fused.parts)} "
            f"have {said}. Check --base."
        )
    return lie


def of_rows(site: Site, module: str, index: Array) -> Site:
    """What a site does to some rows of W, in this order, as a site of a module that has these alone."""
    names = getattr(variant_of(site), "ROWS", ())
    facts = {
        name: replace(info, shape=(len(index), *info.shape[1:])) if name in names else info
        for name, info in site.factors.items()
    }

    def load() -> dict[str, Array]:
        return {n: f[index] if n in names else f for n, f in site.load().items()}

    return replace(site, module=module, factors=facts, load=load)


def nothing_to_do(adapter: Adapter, what: str, names: list[str]) -> MatchError:
    """The error for an adapter in which no module is of a kind that is known by these names."""
    known = ", ".join(dict.fromkeys(names))
    return MatchError(
        f"{adapter.path}: none of its modules is {what} of a projection whose rows are known ({known}). Check "
        "--base, or leave --projections out."
    )
