"""What the inputs of adapted modules are like on a text: E[u uᵀ] with u = A x, by transformers (extra `train`).

The base runs with the adapter's changes added to its modules' outputs, so that each x is what the module gets when the
adapter is used. Sums alone are kept, whatever the text's length: [k, k] for a change B A of rank k, whose outputs depend on
x through A x alone; [in, in] for a change without factors, in as many passes over the text as memory asks for; a
count of each token for such a change of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import MatchError
from lorasurgery.naming import Names
from lorasurgery.operations._language_model import LanguageModel, load, windows
from lorasurgery.operations.activations.calibration import Calibration
from lorasurgery.operations.activations.probe import Moment, Probe
from lorasurgery.operations.algebra.made import check_finite, name_of, pair, variant_of
from lorasurgery.operations.algebra.site_weights import SiteWeights
from lorasurgery.surgery import RunOptions

_MEMORY = 1 << 30  # for sums [in, in], unless max_memory says less


@dataclass(frozen=True, slots=True)
class Activations:
    """A moment of each site, by its name, and how many tokens the model has seen."""

    moments: Mapping[str, Moment]
    tokens: int
    notes: tuple[str, ...]


def gather(
    adapter: Adapter, weights: SiteWeights, calibration: Calibration, how: RunOptions
) -> Activations:
    """Raises MatchError for a site whose module transformers does not run as a linear layer or an embedding."""
    import torch

    model = load(weights.model.path)
    tokens = calibration.read(model)
    parts = list(windows(tokens, calibration.window))
    live = Live(adapter, weights, model)
    probes = [live.probe(site) for site in live.sites]
    passes = _passes(probes, how.max_memory or _MEMORY)
    with torch.inference_mode(), ExitStack() as hooks:
        for probe in probes:
            handle = probe.module.register_forward_hook(probe.hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for i, counting in enumerate(passes):
            for probe in probes:
                probe.counting = probe in counting
            for start, part in parts:
                model.logits(part)
                done = i * len(tokens) + start + len(part)
                how.progress(done, len(passes) * len(tokens), calibration.text.name)
    _check_run(adapter, probes, calibration)
    seen = sum(len(part) for _, part in parts)
    moments = {probe.name: probe.moment() for probe in probes}
    return Activations(moments, seen, tuple(_notes(adapter, calibration, moments, seen)))


class Live:
    """An adapter's sites as modules of the model that transformers has built of the base."""

    def __init__(self, adapter: Adapter, weights: SiteWeights, model: LanguageModel) -> None:
        self.adapter, self._weights = adapter, weights
        self._live: dict[str, Any] = dict(model.model.named_modules())
        wanted = [f"{site.module}.weight" for site in adapter.sites]
        held = [f"{n}.weight" for n, m in self._live.items() if hasattr(m, "weight")]
        self._names = Names(held, wanted)

    @property
    def sites(self) -> list[Site]:
        """Those that the base has a place for, and it need not have one for all."""
        return [site for site in self.adapter.sites if name_of(site) in self._weights.shares]

    def module(self, site: Site) -> tuple[Any, bool]:
        """Its module, and whether inputs are in the rows of what the site changes."""
        import torch
        from transformers.pytorch_utils import Conv1D

        name = name_of(site)
        stored = self._names.find(f"{site.module}.weight")
        module = self._live[stored.removesuffix(".weight")] if stored else None
        known = isinstance(module, (torch.nn.Linear, torch.nn.Embedding, Conv1D))
        if not known or site.parameter != "weight":
            what = "no module's weight"
            if module is not None:
                what = f"the {site.parameter} of a {type(module).__name__}"
            raise MatchError(
                f"{self.adapter.path}: {name} is {what} to transformers, and inputs are seen of linear "
                "layers and embeddings alone. Leave out --calibrate."
            )
        # a site that means a tensor as it is stored has inputs in its rows where a linear layer is turned
        return module, isinstance(module, torch.nn.Embedding) or (
            isinstance(module, Conv1D) and site.layout == "parameter"
        )

    def probe(self, site: Site) -> Probe:
        """Raises MatchError for a module that is no linear layer or embedding, ValueRangeError for nan."""
        name, (module, turned) = name_of(site), self.module(site)
        form = pair(site)
        if form is not None:
            check_finite(self.adapter, site, *form)
            a, b = (form[1].T, form[0].T) if turned else form
            return Probe(name, module, a, b, turned=turned)
        delta = variant_of(site).delta(self._weights.read(site), site.load(), site.config)
        check_finite(self.adapter, site, delta)
        return Probe(name, module, None, delta.T if turned else delta, turned=turned)


def _passes(probes: Sequence[Probe], memory: int) -> list[list[Probe]]:
    """Which probes count together: their sums fit, or one of them is more by itself."""
    passes: list[list[Probe]] = [[]]
    held = 0
    for probe in probes:
        if held and held + probe.nbytes > memory:
            passes.append([])
            held = 0
        passes[-1].append(probe)
        held += probe.nbytes
    return passes


def _check_run(adapter: Adapter, probes: Sequence[Probe], calibration: Calibration) -> None:
    if silent := [probe.name for probe in probes if not probe.tokens]:
        raise MatchError(
            f"{adapter.path}: {silent[0]} is never run on {calibration.text}, so that its inputs are not "
            "known. Leave out --calibrate."
        )


def _notes(
    adapter: Adapter, calibration: Calibration, moments: Mapping[str, Moment], tokens: int
) -> list[str]:
    """What must be said beside numbers that come from a text."""
    notes = [
        f"inputs are those of {tokens} tokens of {calibration.text}, in windows of {calibration.window}."
    ]
    # beside factors it is the base's own tensor
    if wholes := [n for n in (*adapter.replaced, *adapter.added) if n not in moments]:
        notes.append(
            f"they leave out what the adapter replaces or adds whole: {', '.join(wholes)}."
        )
    most = max((m.second.shape[0] for m in moments.values() if m.second.ndim == 2), default=0)
    if tokens < most:
        notes.append(
            f"{tokens} tokens show less than the {most} directions of an input: more are better."
        )
    return notes
