"""Which modules an adapter's factors are of: projections split or fused, experts one by one or stacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lorasurgery.adapter import Adapter
from lorasurgery.errors import UnknownNameError
from lorasurgery.model import Model
from lorasurgery.operations.layouts.experts_single import single
from lorasurgery.operations.layouts.experts_stacked import stacked
from lorasurgery.operations.layouts.projections_fused import fuse
from lorasurgery.operations.layouts.projections_split import split
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.plugins import suggestion

_PROJECTIONS = ("split", "fused")
_EXPERTS: dict[str, Callable[[Adapter, Model | None], Relaid]] = {
    "single": single,
    "stacked": stacked,
}


@dataclass(frozen=True, slots=True)
class Layout:
    """'split' or 'fused' projections, 'single' or 'stacked' experts; None: as they are."""

    projections: str | None = None
    experts: str | None = None

    def check(self) -> None:
        """Raises UnknownNameError."""
        for flag, value, known in (
            ("--projections", self.projections, _PROJECTIONS),
            ("--experts", self.experts, tuple(_EXPERTS)),
        ):
            if value is not None and value not in known:
                raise UnknownNameError(
                    f"{flag} {value}: is no layout. {suggestion(value, list(known))}"
                )

    @property
    def asked(self) -> bool:
        return bool(self.projections or self.experts)

    @property
    def settings(self) -> dict[str, object]:
        return {"projections": self.projections, "experts": self.experts} if self.asked else {}

    def before(self, adapter: Adapter, model: Model | None) -> Relaid:
        """What is done to an adapter before it becomes another variant, on weights as the new layout has them."""
        made = Relaid(adapter, adapter.sites, ())
        if self.experts:
            made = made.then(lambda one: _EXPERTS[self.experts or ""](one, model))
        if self.projections == "fused":
            made = made.then(lambda one: fuse(one, model.config if model else {}))
        return made

    def after(self, adapter: Adapter, model: Model | None) -> Relaid:
        """What is done last: a change of fused weights is split once it is there."""
        if self.projections == "split":
            return split(adapter, model.config if model else {})
        return Relaid(adapter, adapter.sites, ())
