"""Factors that belong to one base carry its hash: on another they are refused."""

from __future__ import annotations

import blake3

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


def digest(model: Model, name: str) -> str:
    """The hash that extra['base'] holds: of the numbers in the base's dtype, codes decoded."""
    return f"blake3:{blake3.blake3(as_bytes(model.weights.read(name))).hexdigest()}"
