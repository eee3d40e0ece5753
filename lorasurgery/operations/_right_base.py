"""Factors that belong to one base carry its hash: on another they are refused."""

from __future__ import annotations

from dataclasses import replace

import blake3

from lorasurgery.adapter import Adapter
from lorasurgery.arrays import as_bytes
from lorasurgery.errors import MatchError
from lorasurgery.model import Model
from lorasurgery.targets import Resolved, resolve


def check_base(model: Model, resolved: Resolved) -> None:
    """Raises MatchError where a site names another weight than the model has."""
    for name, target in resolved.targets.items():
        wanted = {share.site.config.extra.get("base") for share in target.shares} - {None}
        found = digest(model, name) if wanted else None
        wrong = [str(digest) for digest in wanted if digest != found]
        if wrong:
            raise MatchError(
                f"{model.path}: {name} has {str(found)[:19]}, but the adapter belongs to a base where it "
                f"has {wrong[0][:19]}. Name the base that it was trained on."
            )


def bound(model: Model, adapter: Adapter) -> Adapter:
    """The adapter with the hash of its weight in each site that belongs to one base."""
    belongs = {site.module for site in adapter.sites if site.config.variant == "delta_lora"}
    if not belongs:
        return adapter
    found = {
        share.site.module: digest(model, name)
        for name, target in resolve(model, adapter).targets.items()
        for share in target.shares
        if share.site.module in belongs
    }
    sites = []
    for site in adapter.sites:
        extra = {**site.config.extra, "base": found[site.module]} if site.module in found else None
        sites.append(replace(site, config=replace(site.config, extra=extra)) if extra else site)
    return replace(adapter, sites=tuple(sites))


def digest(model: Model, name: str) -> str:
    """The hash that extra['base'] holds: of the numbers in the base's dtype, codes decoded."""
    return f"blake3:{blake3.blake3(as_bytes(model.weights.read(name))).hexdigest()}"
