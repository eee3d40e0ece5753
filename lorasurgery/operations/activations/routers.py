"""How routers share out a text's tokens, and how far what stands for a mixture is from it (extra `train`).

The base runs with the mixture itself switched on: each router sees what it sees when the adapter is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.adapters import moral
from lorasurgery.errors import MatchError
from lorasurgery.operations._language_model import load, windows
from lorasurgery.operations.activations.calibration import Calibration
from lorasurgery.operations.activations.gather import Live
from lorasurgery.operations.activations.probe import Probe
from lorasurgery.operations.activations.weighed import share
from lorasurgery.operations.algebra.made import check_finite, name_of
from lorasurgery.operations.algebra.mixture import routed
from lorasurgery.operations.algebra.site_weights import SiteWeights
from lorasurgery.surgery import RunOptions

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class OnText:
    """A mixture's adapter, the weights below it, and the text that it is run on."""

    adapter: Adapter
    weights: SiteWeights
    calibration: Calibration

    def gates(self, how: RunOptions) -> Adapter:
        """The adapter with each module's mean gates on this text in place of those recorded."""
        seen = _run(self, {}, how)

        def measured(site: Site) -> Site:
            if name_of(site) not in seen:
                return site
            extra = {**site.config.extra, "gate_means": seen[name_of(site)].means}
            return replace(site, config=replace(site.config, extra=extra))

        return replace(self.adapter, sites=tuple(map(measured, self.adapter.sites)))

    def errors(self, made: Adapter, how: RunOptions) -> dict[str, dict[str, float]]:
        """What `made` lacks of what each mixture adds to its module's outputs; and the mean gates."""
        seen = _run(self, {name_of(site): site for site in made.sites}, how)
        return {name: probe.metrics for name, probe in seen.items()}


class RouterProbe:
    """Adds a mixture's change to a module's outputs; sums up its gates and what `fixed` lacks of the change."""

    def __init__(
        self, site: Site, module: Any, fixed: Probe | None, held: dict[str, Tensor]
    ) -> None:
        """`held`: the gates that each layer with a router made last, by its module."""
        import torch

        self.name, self.module = name_of(site), module
        self._factors = {name: torch.from_numpy(f) for name, f in site.load().items()}
        self._config, self._fixed = site.config, fixed
        self._held, self._router = held, moral.follows(site.config) or site.module
        self._gates: Tensor = torch.zeros(moral.experts(site.config), dtype=torch.float64)
        self._error2 = self._norm2 = 0.0
        self.tokens = 0

    def hook(
        self, _module: Any, args: Sequence[Tensor], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        """The output that the module has with the mixture."""
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.reshape(-1, x.shape[-1]).float()
        if "router" in self._factors:
            self._held[self._router] = moral.gates(x, self._factors["router"], self._config)
        gates = self._held[self._router]
        change = moral.added(x, gates, self._factors, self._config)
        self._gates += gates.double().sum(0)
        self.tokens += len(x)
        if self._fixed is not None:
            self._error2 += float((change - self._fixed.change(x)).double().square().sum())
            self._norm2 += float(change.double().square().sum())
        return output + change.reshape(output.shape).to(output.dtype)

    @property
    def means(self) -> list[float]:
        """Of the gates, which sum to 1."""
        return [float(g) for g in self._gates / self.tokens]

    @property
    def metrics(self) -> dict[str, float]:
        """Of the outputs, per token."""
        error2, norm2 = self._error2 / self.tokens, self._norm2 / self.tokens
        found = {
            "output_error": share(error2, norm2), "output_error2": error2, "output_norm2": norm2,
        }  # fmt: skip
        return found | {f"gate_{i}": gate for i, gate in enumerate(self.means)}


def _run(on: OnText, made: Mapping[str, Site], how: RunOptions) -> dict[str, RouterProbe]:
    """Every routed module's probe after the text. Raises MatchError for a module that is not run."""
    import torch

    model = load(on.weights.model.path)
    tokens = on.calibration.read(model)
    live = Live(on.adapter, on.weights, model)
    with torch.inference_mode(), ExitStack() as hooks:
        probes: list[RouterProbe | Probe] = []
        held: dict[str, Tensor] = {}
        for site in live.sites:
            probe = _probe(live, site, made, held) if routed(site) else live.probe(site)
            handle = probe.module.register_forward_hook(probe.hook, with_kwargs=True)
            hooks.callback(handle.remove)
            probes.append(probe)
        for start, part in windows(tokens, on.calibration.window):
            model.logits(part)
            how.progress(start + len(part), len(tokens), on.calibration.text.name)
    routers = [probe for probe in probes if isinstance(probe, RouterProbe)]
    if silent := [probe.name for probe in routers if not probe.tokens]:
        raise MatchError(
            f"{on.adapter.path}: {silent[0]} is never run on {on.calibration.text}, so that its gates are not "
            "known. Pass --gates and leave out --calibrate."
        )
    return {probe.name: probe for probe in routers}


def _probe(
    live: Live, site: Site, made: Mapping[str, Site], held: dict[str, Tensor]
) -> RouterProbe:
    check_finite(live.adapter, site, *site.load().values())
    module, _ = live.module(site)
    fixed = made.get(name_of(site))
    return RouterProbe(site, module, None if fixed is None else live.probe(fixed), held)


def note_of(modules: int, calibration: Calibration | None) -> list[str]:
    """What must be said of a mixture whose gates are fixed, and of the text that it was held against."""
    stand = f"in {modules} modules fixed gates stand for the router"
    if calibration is None:
        return [
            f"{stand}, whose error only text would show: exact where the gates do not depend on the token."
        ]
    return [
        f"{stand}: errors of outputs are what they lack of the mixture's own change on "
        f"{calibration.text}, in windows of {calibration.window}."
    ]
