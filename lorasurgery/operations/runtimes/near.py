"""What a runtime does not read and no small LoRA equals, as the nearest LoRA of a rank, with its error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site
from lorasurgery.model import Model
from lorasurgery.operations.algebra.convert_site import Conversion, convert_site
from lorasurgery.operations.algebra.into import Form
from lorasurgery.operations.algebra.made import each, variant_of
from lorasurgery.operations.algebra.nearest import Aim
from lorasurgery.operations.algebra.site_weights import site_weights
from lorasurgery.operations.lint import runtime_of
from lorasurgery.surgery import RunOptions


@dataclass(frozen=True, slots=True)
class Near:
    """An adapter for a runtime; by the id of each site that was made for it, what that was and what it lacks."""

    adapter: Adapter
    origins: Mapping[int, Site]
    lost: Mapping[int, Mapping[str, float]]


# variants that have claims of their own
NAMES = {"dora": "DoRA", "ia3": "IA3"}


def reads(runtime: str, variant: str) -> bool:
    """Whether a runtime reads a variant in the layout that is written for it."""
    known = runtime_of(runtime)
    claim = known.claims.get(NAMES.get(variant, "other variants"))
    held = plugins.load("dialects", known.layouts[0]).VARIANTS
    return variant == "lora" or (variant in held and claim is not None and claim.verdict == "ok")


def far(site: Site, runtime: str) -> bool:
    """Whether it is neither read there nor a product of small factors."""
    if reads(runtime, site.config.variant):
        return False
    return variant_of(site).low_rank(site.load(), site.config) is None


def nearest(
    adapter: Adapter, runtime: str, rank: int, model: Model | None, how: RunOptions
) -> Near:
    """The far ones as LoRA, the others as they are. Raises UsageError where W decides and no model is given."""
    some = [site for site in adapter.sites if far(site, runtime)]
    weights = site_weights(model, adapter) if model is not None and some else None
    work = Conversion(adapter, Form("lora"), Aim(rank), weights, folded=True)
    found = dict(zip(map(id, some), each(some, lambda s: convert_site(work, s), how), strict=True))
    sites = tuple(found[id(s)].site if id(s) in found else s for s in adapter.sites)
    pairs = list(zip(sites, adapter.sites, strict=True))
    return Near(
        replace(adapter, sites=sites),
        {id(new): old for new, old in pairs},
        {id(new): found[id(old)].metrics for new, old in pairs if id(old) in found},
    )
