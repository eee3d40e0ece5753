"""One site as another variant: by a closed form where there is one, by the nearest low rank where not.

Every way leads through LoRA. A variant whose change is no product of small factors is seen on its base weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site, Variant
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.weighed import Cut, Product, cut_matrix
from lorasurgery.operations.algebra.interference import inner
from lorasurgery.operations.algebra.made import check_finite, kept, name_of, pair, variant_of
from lorasurgery.operations.algebra.nearest import Aim, loss, nearest
from lorasurgery.operations.algebra.site_weights import SiteWeights
from lorasurgery.operations.algebra.subspace import square
from lorasurgery.operations.algebra.svd import of_product, rank_for
from lorasurgery.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Conversion:
    """To which variant, with how much of each change, and the base's weights where they are given."""

    adapter: Adapter
    to: str
    aim: Aim
    weights: SiteWeights | None
    folded: bool = False  # a LoRA becomes one of scaling 1
    moments: Mapping[str, Moment] | None = (
        None  # of each site's inputs, where they weigh what is cut
    )

    @property
    def target(self) -> Variant:
        return cast(Variant, plugins.load("adapters", self.to))


@dataclass(frozen=True, slots=True)
class Converted:
    """A site, whether it is exactly what it was, and the numbers of the report."""

    site: Site
    exact: bool
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class _AsLora:
    a: Array
    b: Array
    error2: float
    norm2: float
    exact: bool
    weight2: float | None  # ||W + ΔW||², where W is known
    weighed: dict[str, float] = field(default_factory=dict)  # errors of outputs


def convert_site(how: Conversion, site: Site) -> Converted:
    """Raises UsageError where the base is needed, MatchError where there is no way."""
    w = how.weights.read(site) if how.weights else None
    if _is_wanted(how, site):
        return Converted(site, True, {"energy": 1.0, "relative_error": 0.0})
    found = _as_lora(how, site, w)
    seen = _as_matrix(how, site)
    made = kept(seen, found.a, found.b) if how.to == "lora" else _from_lora(how, seen, w, found)
    metrics = _metrics(found.a.shape[-2], found.error2, found.norm2, found.weight2)
    return Converted(made, found.exact, metrics | found.weighed)


def _is_wanted(how: Conversion, site: Site) -> bool:
    """Whether nothing is asked of it but what it is."""
    asked = how.folded or how.aim.rank is not None or how.aim.energy is not None
    return site.config.variant == how.to and not asked


def _metrics(rank: int, error2: float, norm2: float, w2: float | None) -> dict[str, float]:
    """`weight_error`: of W', relative to it; of a W' that is known."""
    found = {"rank": float(rank), **loss(error2, norm2)}
    return found | ({"weight_error": (error2 / w2) ** 0.5} if w2 else {})


def _as_lora(how: Conversion, site: Site, w: Array | None) -> _AsLora:
    form = pair(site)
    if form is not None:
        check_finite(how.adapter, site, *form)
        weight2 = None if w is None else square(w + form[1] @ form[0])
        if how.moments is not None:
            return _cut_weighed(form, how.aim, how.moments[name_of(site)], weight2)
        return _cut(form, how.aim, weight2)
    if w is None and not variant_of(site).LINEAR_IN_W:
        raise needs_base(site.config.variant, how.to)
    if how.aim.rank is None and how.aim.energy is None:
        raise UsageError(
            f"convert: {site.config.variant} to {how.to} has no closed form at a small rank "
            f"({name_of(site)}). Pass --rank or --energy: the nearest of that rank is found."
        )
    delta = _dense(site, w)
    check_finite(how.adapter, site, delta)
    weight2 = None if w is None else square(w + delta)
    if how.moments is not None:
        return _as_cut(*cut_matrix(delta, how.aim, how.moments[name_of(site)]), weight2)
    a, b, error2, norm2 = nearest(delta, how.aim)
    return _AsLora(a, b, error2, norm2, exact=False, weight2=weight2)


def needs_base(variant: str, to: str) -> UsageError:
    """The error where W decides and is not given."""
    return UsageError(
        f"convert: {variant} to {to} depends on the weights that are changed. Pass --base DIR."
    )


def _dense(site: Site, w: Array | None) -> Array:
    """ΔW; where it is free of W, W's shape is all that is needed."""
    if w is None:
        out, in_ = site.size
        assert out is not None
        assert in_ is not None
        w = nothing((site.experts, out, in_) if site.layout == "experts" else (out, in_))
    delta: Array = variant_of(site).delta(w, site.load(), site.config).reshape(w.shape)
    return delta


def nothing(shape: tuple[int, ...]) -> Array:
    """A weight of this shape for those that look at no more."""
    return np.broadcast_to(np.float32(0), shape)


def _cut(form: tuple[Array, Array], aim: Aim, weight2: float | None) -> _AsLora:
    """The factors as they are, or the first singular triplets of their product."""
    a, b = form
    if aim.energy is None and (aim.rank is None or a.shape[-2] <= aim.rank):
        return _AsLora(a, b, 0.0, inner(form, form), exact=True, weight2=weight2)
    found = of_product(a, b)
    squares = np.square(found.s).reshape(-1, found.s.shape[-1]).sum(axis=0)
    rank = _rank(squares, aim)
    lost = float(squares[rank:].sum())
    whole = float(squares.sum())
    return _AsLora(*found.factors(rank), lost, whole, exact=lost == 0, weight2=weight2)


def _cut_weighed(
    form: tuple[Array, Array], aim: Aim, moment: Moment, weight2: float | None
) -> _AsLora:
    """`_cut`, with energy and nearness counted in the module's outputs."""
    product = Product(*form, moment)
    rank = _rank(product.energy, aim)
    made, plain = product.cut(rank), product.plain(rank)
    if rank < min(len(product.energy), form[0].shape[-2]):
        return _as_cut(made, plain, weight2)
    whole = _cut(form, Aim(), weight2)
    nothing_lost = replace(made, error2=0.0, output_error2=0.0)
    return replace(whole, weighed=nothing_lost.outputs | nothing_lost.unweighted)


def _as_cut(made: Cut, plain: Cut, weight2: float | None) -> _AsLora:
    return _AsLora(
        made.a, made.b, made.error2, made.norm2, exact=made.error2 == 0, weight2=weight2,
        weighed=made.outputs | plain.unweighted,
    )  # fmt: skip


def _rank(squares: Array, aim: Aim) -> int:
    """How many of the energies by rank [k] are aimed at."""
    rank = len(squares) if aim.energy is None else max(1, rank_for(squares, aim.energy))
    return min(rank, aim.rank or rank)


def _as_matrix(how: Conversion, site: Site) -> Site:
    """A convolution whose factors know the channels alone becomes one whose factors know all of W."""
    if site.layout != "channels":
        return site
    assert how.weights is not None, site
    return replace(site, layout="linear", kernel=how.weights.kernel(site))


def _from_lora(how: Conversion, site: Site, w: Array | None, found: _AsLora) -> Site:
    target, a, b = how.target, found.a, found.b
    if w is None and not target.LINEAR_IN_W:
        raise needs_base(site.config.variant, how.to)
    if a.ndim == 3:
        raise MatchError(
            f"{how.adapter.path}: {name_of(site)} is a stack of experts, and a {how.to} is of one matrix. Pass "
            "--experts single, or --to lora."
        )
    base = nothing((len(b), a.shape[1])) if w is None else w
    factors = target.from_lora(base, a, b)
    if factors is None:
        raise MatchError(
            f"{how.adapter.path}: no factors of {how.to} make the change of {name_of(site)}. "
            "lorasurgery convert --explain shows what can become what."
        )
    held = {name: np.ascontiguousarray(f, np.float32) for name, f in factors.items()}
    infos = {name: TensorInfo(name, "F32", f.shape) for name, f in held.items()}
    sides = (None, None) if {"A", "B"} <= held.keys() else (len(b), a.shape[1])
    config = AdapterConfig(how.to, len(a), float(len(a)))
    return replace(
        site, config=config, factors=infos, load=lambda: held, sides=sides,
    )  # fmt: skip
