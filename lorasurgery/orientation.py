"""Whether a weight is stored [out, in] or turned: its shape tells, and where it is square, the architecture.

PEFT before 0.19 took every stack of experts for [experts, in, out], so that older factors are of the transpose
of an [experts, out, in]; where W is square, factors are taken for what they should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Site
from lorasurgery.layouts import CONV1D, TURNED_EXPERTS
from lorasurgery.naming import Names, Part
from lorasurgery.problems import Problem

if TYPE_CHECKING:
    from lorasurgery.model import Model


def parts_of(model: Model, names: Names, name: str, site: Site) -> list[Part]:
    """Where a site's parameter is stored: the rows of each expert's matrices are told from their shapes."""
    out, in_ = site.size
    found = [names.parts(name, out or 0, site.experts)]
    if site.layout == "experts":
        found.append(names.parts(name, in_ or 0, site.experts))
    fitting = (p for p in found if p and orientation(model, site, p[0]) is not None)
    return next(fitting, found[0] or found[-1])


def orientation(model: Model, site: Site, part: Part) -> bool | None:
    """Whether W is stored turned, [in, out]; None if the factors fit neither way."""
    info = model.weights.info(part.tensor)
    out, in_ = site.size
    stack = site.layout == "experts" and part.expert is None
    if stack and (len(info.shape) != 3 or info.shape[0] != site.experts):
        return None
    if stack:
        _, rows, columns = info.shape
    else:  # a convolution's weight is [out, in, ...]
        rows = info.shape[0] if info.shape else 1
        columns = info.numel // max(1, rows)
    if site.layout == "channels":
        columns = info.shape[1] if len(info.shape) > 1 else 1
    some = None if part.rows is None else part.rows[1] - part.rows[0]
    straight = (some or out) in (None, rows) and in_ in (None, columns)
    turned = out in (None, columns) and (some or in_) in (None, rows)
    if straight and turned:
        return _turned_by_name(model.config, site)
    if turned and not _may_turn(model.config, site):
        return None
    return turned if straight or turned else None


def _may_turn(config: Mapping[str, Any], site: Site) -> bool:
    if site.layout == "linear":
        return site.fan_in_fan_out or _is_conv1d(config, site)
    return site.layout == "experts"


def _turned_by_name(config: Mapping[str, Any], site: Site) -> bool:
    """Square weights: only the architecture, or else the trainer's flag, can tell."""
    kind = str(config.get("model_type", ""))
    if site.layout == "experts":
        return kind in TURNED_EXPERTS
    if kind in CONV1D:
        return _is_conv1d(config, site)
    return site.layout == "linear" and site.fan_in_fan_out


def _is_conv1d(config: Mapping[str, Any], site: Site) -> bool:
    names = CONV1D.get(str(config.get("model_type", "")), ())
    return site.layout == "linear" and site.module.rpartition(".")[2] in names


def misfit(model: Model, site: Site, part: Part) -> Problem:
    """The problem of factors that fit a weight neither way."""
    info = model.weights.info(part.tensor)
    if site.sides != (None, None) or "A" not in site.factors:
        first = next(iter(site.factors.values()))
        size = ", ".join("any" if side is None else str(side) for side in site.sides)
        return Problem(
            first.name,
            f"{site.module}: the factors are of a weight of [{size}], but {part.tensor} in "
            f"{model.path} is {list(info.shape)}",
        )
    a, b = site.factors["A"], site.factors["B"]
    return Problem(
        a.name,
        f"{site.module}: A {list(a.shape)} and B {list(b.shape)} make a change of "
        f"[{b.shape[-2]}, {a.shape[-1]}], but {part.tensor} in {model.path} is {list(info.shape)}",
    )
