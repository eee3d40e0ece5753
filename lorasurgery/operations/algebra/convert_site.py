"""One site as another variant: by a closed form where there is one, by the nearest low rank where not.

Every way leads through LoRA but those of `direct.py`. A variant whose change is no product of small factors is seen on its base weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.operations.activations.probe import Moment
from lorasurgery.operations.activations.weighed import cut_matrix
from lorasurgery.operations.algebra.cutting import AsLora, as_cut, cut, cut_weighed
from lorasurgery.operations.algebra.direct import directly, way
from lorasurgery.operations.algebra.into import Form, Held, exactly, nearest_of
from lorasurgery.operations.algebra.made import check_finite, kept, name_of, pair, variant_of
from lorasurgery.operations.algebra.nearest import Aim, loss, nearest
from lorasurgery.operations.algebra.site_weights import SiteWeights
from lorasurgery.operations.algebra.subspace import square


@dataclass(frozen=True, slots=True)
class Conversion:
    """To which variant, with how much of each change, and the base's weights where they are given."""

    adapter: Adapter
    form: Form
    aim: Aim
    weights: SiteWeights | None
    folded: bool = False  # a LoRA becomes one of scaling 1
    residual: SiteWeights | None = None  # what the factors are added to, where it is not W
    # of each site's inputs, where they weigh what is cut
    moments: Mapping[str, Moment] | None = None

    @property
    def to(self) -> str:
        return self.form.variant


@dataclass(frozen=True, slots=True)
class Converted:
    """A site, whether it is exactly what it was, and the numbers of the report."""

    site: Site
    exact: bool
    metrics: dict[str, float]


def convert_site(how: Conversion, site: Site) -> Converted:
    """Raises UsageError where the base is needed, MatchError where there is no way."""
    if _is_wanted(how, site):
        return Converted(site, True, {"energy": 1.0, "relative_error": 0.0})
    w = how.weights.read(site) if how.weights and _depends(how, site) else None
    if made := _directly(how, site, w):
        return Converted(made, True, {"energy": 1.0, "relative_error": 0.0})
    found = _as_lora(how, site, w)
    seen = _as_matrix(how, site)
    if how.to == "lora":
        made, error2, exact = kept(seen, found.a, found.b), found.error2, found.exact
    else:
        made, more = _from_lora(how, seen, w, found)
        error2, exact = found.error2 + more, found.exact and not more
    # nothing is lost of a W' that was not looked at, however large it is
    weight2 = math.inf if how.weights and w is None else found.weight2
    metrics = _metrics(made.config.rank, error2, found.norm2, weight2)
    # errors of outputs are known of the LoRA alone
    return Converted(made, exact, metrics | (found.weighed if error2 == found.error2 else {}))


def _is_wanted(how: Conversion, site: Site) -> bool:
    """Whether nothing is asked of it but what it is."""
    return site.config.variant == how.to and not _asked(how)


def _asked(how: Conversion) -> bool:
    cut = how.aim.rank is not None or how.aim.energy is not None
    return how.folded or cut or how.residual is not None


def _directly(how: Conversion, site: Site, w: Array | None) -> Site | None:
    """The same change without a LoRA between them, where there is such a way and all of it is kept."""
    if _asked(how) or way(site.config.variant, how.to) is None:
        return None
    if w is None:
        raise needs_base(site.config.variant, how.to)
    made = directly(site, how.to, w)
    if made is not None:
        check_finite(how.adapter, site, *made.load().values())
    return made


def _depends(how: Conversion, site: Site) -> bool:
    """Whether W decides anything: to a LoRA, a closed form that nothing is cut of is free of it."""
    form = pair(site)
    if form is None or how.to != "lora" or how.aim.energy is not None or how.residual is not None:
        return True
    return how.aim.rank is not None and how.aim.rank < form[0].shape[-2]


def _metrics(rank: int, error2: float, norm2: float, w2: float | None) -> dict[str, float]:
    """`weight_error`: of W', relative to it; of a W' that is known."""
    found = {"rank": float(rank), **loss(error2, norm2)}
    return found | ({"weight_error": (error2 / w2) ** 0.5} if w2 else {})


def _as_lora(how: Conversion, site: Site, w: Array | None) -> AsLora:
    form = pair(site)
    if form is not None and how.residual is not None:
        assert w is not None, site
        return _beside(how, site, w, form)
    if form is None and w is not None and how.moments is None:
        form = _on(site, w)
    if form is not None:
        check_finite(how.adapter, site, *form)
        weight2 = None if w is None else square(w + form[1] @ form[0])
        if how.moments is not None:
            return cut_weighed(form, how.aim, how.moments[name_of(site)], weight2)
        return cut(form, how.aim, weight2)
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
        return as_cut(*cut_matrix(delta, how.aim, how.moments[name_of(site)]), weight2)
    a, b, error2, norm2 = nearest(delta, how.aim)
    return AsLora(a, b, error2, norm2, exact=False, weight2=weight2)


def _on(site: Site, w: Array) -> tuple[Array, Array] | None:
    """The factors of a change that is low-rank once W is known, where the variant has such a form."""
    low_rank_on = getattr(variant_of(site), "low_rank_on", None)
    if low_rank_on is None or w.ndim != 2:
        return None
    found: tuple[Array, Array] = low_rank_on(w, site.load(), site.config)
    return found


def _beside(how: Conversion, site: Site, w: Array, form: tuple[Array, Array]) -> AsLora:
    """What turns W into the residual with B A on it: where a start of rank r was moved, of rank 2 r."""
    assert how.residual is not None, site
    merged = how.residual.read(site) + form[1] @ form[0]
    delta = merged - w
    check_finite(how.adapter, site, delta)
    asked = how.aim.rank is not None or how.aim.energy is not None
    aim = how.aim if asked else replace(how.aim, rank=2 * form[0].shape[-2])
    a, b, error2, norm2 = nearest(delta, aim)
    return AsLora(a, b, error2, norm2, exact=False, weight2=square(merged))


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


def _as_matrix(how: Conversion, site: Site) -> Site:
    """A convolution whose factors know the channels alone becomes one whose factors know all of W."""
    if site.layout != "channels":
        return site
    assert how.weights is not None, site
    return replace(site, layout="linear", kernel=how.weights.kernel(site))


def _from_lora(how: Conversion, site: Site, w: Array | None, found: AsLora) -> tuple[Site, float]:
    """The site, and ||B A - what it does||²."""
    a, b = found.a, found.b
    if w is None and (how.form.bound or not how.form.module.LINEAR_IN_W):
        raise needs_base(site.config.variant, how.to)
    if a.ndim == 3:
        raise MatchError(
            f"{how.adapter.path}: {name_of(site)} is a stack of experts, and a {how.to} is of one matrix. Pass "
            "--experts single, or --to lora."
        )
    form = how.form
    if form.bound and how.weights:
        form = form.with_extra(base=how.weights.digest(site))
    base = nothing((len(b), a.shape[1])) if w is None else w
    held: Held | None = exactly(form, base, (a, b))
    if held is None and not site.kernel:
        held = nearest_of(form, base, b @ a, (a, b))
    if held is None:
        raise MatchError(
            f"{how.adapter.path}: no factors of {how.to} make the change of {name_of(site)}. "
            "lorasurgery convert --explain shows what can become what."
        )
    return held.at(site, (len(b), a.shape[1])), held.error2
