"""LoRA-drop's importance: g = E||s B A x||² of each module, as a share of its group's, and which modules it keeps.

Zhou et al. 2024, arXiv 2402.07721, §3. From E[u uᵀ], u = A x, it is tr(s² BᵀB E[u uᵀ]): neither s B A nor an x is kept. Modules
of one kind and size can share a pair of factors: they are a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lorasurgery.adapter import Site
from lorasurgery.arrays import Array
from lorasurgery.errors import ValueRangeError
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.algebra.made import name_of

Scope = Literal["group", "all"]


@dataclass(frozen=True, slots=True)
class Importance:
    """`output2` is g, `share` its part of the sum over the group or over all."""

    name: str
    group: str
    output2: float
    share: float
    kept: bool


def output2(a: Array, b: Array, moment: Moment) -> float:
    """E||B A x||² of factors a [k, in] and b [out, k], the scale in b."""
    wide = (a.T if moment.turned else b).astype(np.float64)
    return float(np.sum((wide.T @ wide) * moment.second))


def group_of(site: Site, a: Array, b: Array) -> str:
    """Those that can share a pair of factors: q_proj.576x576."""
    return f"{site.module.rpartition('.')[2]}.{b.shape[-2]}x{a.shape[-1]}"


def ranked(
    sites: Sequence[Site], groups: Sequence[str], found: Sequence[float], share: float, scope: Scope
) -> list[Importance]:
    """Kept is the smallest set whose importance is `share` at least: of each group, or of all.

    Raises ValueRangeError where no change does anything: B has not left 0.
    """
    if not any(found):
        raise ValueRangeError(
            f"--drop: none of the {len(found)} changes does anything to an output on this text; is the adapter "
            "untrained? Train it for some steps first."
        )
    members: dict[str, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group if scope == "group" else ""].append(i)
    made: dict[int, Importance] = {}
    for of in members.values():
        values = np.array([found[i] for i in of])
        total = float(values.sum())
        shares = values / total if total else values
        order = np.argsort(-shares, kind="stable")
        # what is before a module does not suffice; as many roundings as there are modules
        before = np.concatenate([[0.0], np.cumsum(shares[order])[:-1]])
        wanted = (before < share * (1 - 1e-12)) & (shares[order] > 0)
        for place, keep in zip(order, wanted, strict=True):
            i = of[place]
            made[i] = Importance(
                name_of(sites[i]), groups[i], found[i], float(shares[place]), bool(keep)
            )
    return [made[i] for i in range(len(found))]
