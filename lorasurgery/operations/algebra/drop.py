"""Which modules keep factors of their own, and what becomes of the others: LoRA-drop on an adapter that is trained.

The others share one pair for each group, that nearest to all of their changes: the first singular triplets of the mean change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import UsageError, ValueRangeError
from lorasurgery.operations.activations.importance import (
    Importance,
    Scope,
    group_of,
    output2,
    ranked,
)
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.algebra.interference import inner
from lorasurgery.operations.algebra.made import kept, low_rank, name_of, nbytes
from lorasurgery.operations.algebra.nearest import loss
from lorasurgery.operations.algebra.svd import of_product
from lorasurgery.report import Result

Others = Literal["share", "remove"]
Factors = tuple[Array, Array]


@dataclass(frozen=True, slots=True)
class DropOptions:
    """The share of importance that is kept, of each group or of all; what becomes of the other modules."""

    share: float
    scope: Scope = "group"
    others: Others = "share"

    def check(self) -> None:
        """Raises ValueRangeError for what is no share."""
        if not 0 < self.share <= 1:
            raise ValueRangeError(
                f"--drop {self.share:g}: is no share. Pass more than 0 and at most 1."
            )

    @property
    def settings(self) -> dict[str, object]:
        return {"drop": self.share, "drop_over": self.scope, "dropped": self.others}


def dropped(
    adapter: Adapter, moments: Mapping[str, Moment], options: DropOptions
) -> tuple[list[Site], list[Result]]:
    """The sites that are left, and the importance of each with what it loses."""
    forms = [low_rank(adapter, site) for site in adapter.sites]
    groups = [group_of(s, *form) for s, form in zip(adapter.sites, forms, strict=True)]
    found = [
        output2(*form, moments[name_of(s)]) for s, form in zip(adapter.sites, forms, strict=True)
    ]
    importances = ranked(adapter.sites, groups, found, options.share, options.scope)
    shared = _shared(forms, importances) if options.others == "share" else {}
    sites, results = [], []
    for site, form, importance in zip(adapter.sites, forms, importances, strict=True):
        pair = None if importance.kept else shared.get(importance.group)
        made = _own(site, options.others) if importance.kept else _sharing(site, importance, pair)
        sites += [made] if made else []
        results.append(_result(site, form, importance, pair, made))
    return sites, results


def _shared(forms: Sequence[Factors], importances: Sequence[Importance]) -> dict[str, Factors]:
    """One pair for each group, of the largest rank in it."""
    members: dict[str, list[Factors]] = defaultdict(list)
    for form, importance in zip(forms, importances, strict=True):
        if not importance.kept:
            members[importance.group].append(form)
    made = {}
    for group, of in members.items():
        a = np.concatenate([a for a, _ in of])
        b = np.concatenate([b for _, b in of], axis=1) / np.float32(len(of))
        made[group] = of_product(a, b).factors(max(len(a) for a, _ in of))
    return made


def _own(site: Site, others: Others) -> Site:
    """The site as it is; beside shared pairs it is a LoRA-drop's, which a LoRA's factors are."""
    if others == "remove":
        return site
    if site.config.variant not in ("lora", "lora_drop"):
        raise UsageError(
            f"--drop: {name_of(site)} is {site.config.variant}, which shares no factors. Pass --dropped remove, or "
            "convert it first: lorasurgery convert --to lora."
        )
    extra = {k: v for k, v in site.config.extra.items() if k != "shared"}
    return replace(site, config=replace(site.config, variant="lora_drop", extra=extra))


def _sharing(site: Site, importance: Importance, pair: Factors | None) -> Site | None:
    if pair is None:
        return None
    made = kept(site, *pair)
    config = replace(made.config, variant="lora_drop", extra={"shared": importance.group})
    return replace(made, config=config)


def _result(
    site: Site, form: Factors, importance: Importance, pair: Factors | None, made: Site | None
) -> Result:
    norm2 = inner(form, form)
    lost = 0.0 if importance.kept else norm2
    if pair is not None:
        lost = max(0.0, norm2 - 2 * inner(form, pair) + inner(pair, pair))
    metrics = {
        "importance": importance.share, "output2": importance.output2, "kept": float(importance.kept),
        **loss(lost, norm2), "rank": float(made.config.rank if made else 0),
        # a shared pair is of no module's own
        "bytes": float(nbytes(made) if made and importance.kept else 0),
    }  # fmt: skip
    return Result(name_of(site), metrics, {}, {})
