"""Any variant's change as factors: its own, or those of the change itself to what float32 can tell from zero."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import UsageError
from lorasurgery.model import Model
from lorasurgery.operations.algebra.convert_site import nothing
from lorasurgery.operations.algebra.made import check_finite, name_of, pair, variant_of
from lorasurgery.operations.algebra.nearest import Aim, nearest
from lorasurgery.operations.algebra.site_weights import SiteWeights, site_weights
from lorasurgery.targets import completed


@dataclass(frozen=True, slots=True)
class Factored:
    """An adapter's changes as products, with the base's weights where it is given."""

    adapter: Adapter
    weights: SiteWeights | None

    def small(self, site: Site) -> bool:
        """Whether the site's own factors are of its rank."""
        return site.config.variant == "lora" or pair(site) is not None

    def seen(self, site: Site) -> Site:
        """With all of a convolution's W, if its factors know the channels alone."""
        if site.layout != "channels" or self.weights is None:
            return site
        return replace(site, layout="linear", kernel=self.weights.kernel(site))

    def factors(self, site: Site) -> tuple[Array, Array]:
        """A float32 [..., k, in] and B [..., out, k]. Raises UsageError where the base decides, ValueRangeError for nan."""
        form = pair(site)
        if form is None:
            delta = self._dense(site)
            check_finite(self.adapter, site, delta)
            form = _whole(delta)
        check_finite(self.adapter, site, *form)
        return form

    def _dense(self, site: Site) -> Array:
        variant, (out, in_) = variant_of(site), site.size
        if self.weights is not None:
            w = self.weights.read(site)
        elif not variant.LINEAR_IN_W or out is None or in_ is None or site.layout == "channels":
            raise UsageError(
                f"{self.adapter.path}: {name_of(site)} is {site.config.variant}, whose change depends on "
                "the weight. Pass --base DIR."
            )
        else:
            w = nothing((site.experts, out, in_) if site.layout == "experts" else (out, in_))
        delta: Array = variant.delta(w, site.load(), site.config).reshape(w.shape)
        return delta


def factored(adapter: Adapter, model: Model | None) -> Factored:
    """Raises MatchError for a site that depends on a weight which the model does not have."""
    if model is None:
        return Factored(adapter, None)
    adapter = replace(completed(model, adapter), base_config=model.config)
    # what has factors of its own needs no weight
    dense = tuple(site for site in adapter.sites if not Factored(adapter, None).small(site))
    if not dense:
        return Factored(adapter, None)
    weights = site_weights(model, replace(adapter, sites=dense, problems=()))
    sites = tuple(s for s in adapter.sites if not s.optional or weights.has(s))
    return Factored(replace(adapter, sites=sites), weights)


def _whole(delta: Array) -> tuple[Array, Array]:
    """All singular triplets but those that are roundings, alike in number for all experts."""
    a, b, _, _ = nearest(delta, Aim(exact=True))
    sizes = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-2)
    floor = sizes.max(initial=0.0) * max(delta.shape[-2:]) * np.finfo(np.float32).eps
    rank = max(1, int((sizes > floor).reshape(-1, sizes.shape[-1]).any(axis=0).sum()))
    return np.ascontiguousarray(a[..., :rank, :]), np.ascontiguousarray(b[..., :rank])
