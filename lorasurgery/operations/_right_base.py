"""Factors that belong to one base carry its hash: on another they are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import blake3

from lorasurgery.adapter import Adapter
from lorasurgery.arrays import as_bytes
from lorasurgery.errors import MatchError
from lorasurgery.model import Model
from lorasurgery.targets import Resolved


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


def bound(adapter: Adapter, digests: Mapping[str, str]) -> Adapter:
    """The adapter with its weight's hash, by module, in each site that belongs to one base."""
    sites = []
    for site in adapter.sites:
        if site.config.variant == "delta_lora" and site.module in digests:
            extra = {**site.config.extra, "base": digests[site.module]}
            site = replace(site, config=replace(site.config, extra=extra))  # noqa: PLW2901 - the same site
        sites.append(site)
    return replace(adapter, sites=tuple(sites))


def digest(model: Model, name: str) -> str:
    """The hash that extra['base'] holds: of the numbers in the base's dtype, codes decoded."""
    return f"blake3:{blake3.blake3(as_bytes(model.weights.read(name))).hexdigest()}"
