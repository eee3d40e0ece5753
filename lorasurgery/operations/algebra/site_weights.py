"""The base weight of a site, as its variant sees it: [out, in], or [experts, out, in] of however many tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.model import Model
from lorasurgery.operations._right_base import check_base, digest
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.target import Share
from lorasurgery.targets import resolve, unmatched


@dataclass(frozen=True, slots=True)
class SiteWeights:
    """A model, and where in it an adapter's sites lie."""

    model: Model
    shares: Mapping[str, Sequence[Share]]

    def read(self, site: Site) -> Array:
        """W float32 as the site's variant sees it."""
        shares = self.shares[name_of(site)]
        if len(shares) == 1 and shares[0].part.expert is None:
            return self._seen(shares[0], stack=site.layout == "experts")
        return self._stacked(shares)

    def has(self, site: Site) -> bool:
        """Whether the model has the parameter; some do nothing where it has not."""
        return name_of(site) in self.shares

    def digest(self, site: Site) -> str:
        """The hash of W as it is stored. Raises MatchError where it lies in several tensors."""
        first, *others = self.shares[name_of(site)]
        if others or first.part.expert is not None or first.part.rows is not None:
            raise MatchError(
                f"{self.model.path}: {name_of(site)} lies in several tensors, or in a part of one, of which "
                "no hash is kept. Merge it."
            )
        return digest(self.model, first.part.tensor)

    def kernel(self, site: Site) -> tuple[int, ...]:
        """Of a convolution."""
        return self.shares[name_of(site)][0].info.shape[2:]

    def _seen(self, share: Share, *, stack: bool) -> Array:
        w = self._stored(share)
        w = w if stack else w.reshape(len(w), -1)
        return np.ascontiguousarray(w.swapaxes(-1, -2)) if share.turned else w

    def _stored(self, share: Share) -> Array:
        w = self.model.weights.read(share.part.tensor).astype(np.float32)
        self.model.weights.release(share.part.tensor)
        return w

    def _stacked(self, shares: Sequence[Share]) -> Array:
        """One matrix for each expert, of a few tensors on top of each other."""
        parts: dict[int, list[Share]] = {}
        for share in shares:
            parts.setdefault(share.part.expert or 0, []).append(share)
        experts = []
        for _, of in sorted(parts.items()):
            rows = sorted(of, key=lambda s: s.part.rows or (0, 0))
            experts.append(np.concatenate([self._stored(s) for s in rows]))
        turned = shares[0].turned
        return (
            np.ascontiguousarray(np.stack(experts).swapaxes(1, 2)) if turned else np.stack(experts)
        )


def site_weights(model: Model, adapter: Adapter, *, routed: bool = False) -> SiteWeights:
    """Raises MatchError for a site that no tensor of the model holds, or that is for another model.

    `routed`: what depends on the token has weights, too, though it is no change of them.
    """
    resolved = resolve(model, adapter, routed=routed)
    if problems := [*resolved.problems, *unmatched(model, resolved)]:
        raise MatchError(f"{adapter.path}: {problems[0].message}. Check --base.")
    check_base(model, resolved)
    shares: dict[str, list[Share]] = {}
    for target in resolved.targets.values():
        for share in target.shares:
            shares.setdefault(name_of(share.site), []).append(share)
    return SiteWeights(model, shares)
