"""A routed mixture (MoRAL) as what a merged weight or a server can hold: fixed gates, one expert, or all apart.

With the gates fixed it is a LoRA of rank N r, exactly what the mixture does where its router is constant; the
other two are exact for the tokens that chose just that expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.adapters import moral
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, UsageError, ValueRangeError
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.report import Result
from lorasurgery.tensors import TensorInfo

Way = Literal["mean", "top", "experts"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True, slots=True)
class Mixture:
    """What becomes of the router; `gates` for all modules, None: each module's means on a text, or as recorded."""

    way: Way | None = None
    gates: tuple[float, ...] | None = None
    uniform: bool = False

    @property
    def fixed(self) -> bool:
        """Whether gates that do not depend on the token stand for the router."""
        return self.way in ("mean", "top")

    @property
    def measured(self) -> bool:
        """Whether a text may say which gates: nobody has."""
        return self.fixed and self.gates is None and not self.uniform

    def check(self) -> None:
        """Raises UsageError or ValueRangeError."""
        given = self.uniform or self.gates is not None
        if given and self.way not in ("mean", "top"):
            raise UsageError("--gates: goes with --mixture mean or top. Add it.")
        if self.uniform and self.way == "top":
            raise UsageError("--gates uniform: has no top expert. Pass --gates G1,...,GN.")
        for gates in [self.gates] if self.gates is not None else []:
            total = sum(gates)
            if not all(0 <= g <= 1 for g in gates) or not math.isclose(total, 1, abs_tol=1e-3):
                raise ValueRangeError(
                    f"--gates {','.join(f'{g:g}' for g in gates)}: sum to {total:g}, and each has to be "
                    "in 0...1. Pass shares of 1."
                )


def routed(site: Site) -> bool:
    """Whether what the site does depends on the token."""
    return bool(getattr(plugins.load("adapters", site.config.variant), "ROUTED", False))


def unrouted(adapter: Adapter, mixture: Mixture) -> dict[str, Adapter]:
    """Adapters without a router, by the folder that each is for: one, '.', or one an expert.

    Raises UsageError where nobody says what becomes of a router, MatchError for gates of another number.
    """
    some = next((site for site in adapter.sites if routed(site)), None)
    if some is None:
        if mixture.way is not None:
            raise UsageError(
                f"--mixture {mixture.way}: {adapter.path} has no router. Take it away."
            )
        return {".": adapter}
    if mixture.way is None:
        raise UsageError(
            f"convert: a router chooses among the {moral.experts(some.config)} experts of "
            f"{name_of(some)} for each token. Pass --mixture mean, top, or experts."
        )
    if mixture.way == "experts":
        return _apart(adapter)
    sites = tuple(_fixed(site, mixture) if routed(site) else site for site in adapter.sites)
    return {".": replace(adapter, sites=sites)}


def _apart(adapter: Adapter) -> dict[str, Adapter]:
    counts = {moral.experts(site.config) for site in adapter.sites if routed(site)}
    if len(counts) > 1:
        raise MatchError(
            f"{adapter.path}: some modules have {min(counts)} experts and some {max(counts)}, so that no "
            "number of adapters is right. Pass --mixture mean or top."
        )
    return {
        f"expert_{i}": replace(
            adapter, sites=tuple(_expert(s, i) if routed(s) else s for s in adapter.sites)
        )
        for i in range(counts.pop())
    }


def _fixed(site: Site, mixture: Mixture) -> Site:
    gates = _gates(site, mixture)
    if mixture.way == "top":
        return _expert(site, int(np.argmax(gates)))
    n, rank, in_ = site.factors["A"].shape
    out = site.factors["B"].shape[1]

    def load() -> Mapping[str, Array]:
        a, b = moral.mixture(site.load(), site.config, gates)
        return {"A": np.ascontiguousarray(a), "B": np.ascontiguousarray(b)}

    config = AdapterConfig("lora", n * rank, float(n * rank))
    return _lora(site, config, ((n * rank, in_), (out, n * rank)), load)


def _gates(site: Site, mixture: Mixture) -> Array:
    """Float32 [N], that sum to 1."""
    n = moral.experts(site.config)
    if mixture.uniform:
        return np.full(n, 1 / n, np.float32)
    found: Any = site.config.extra.get("gate_means")
    if mixture.gates is not None:
        found = mixture.gates
    if found is None:
        raise UsageError(
            f"convert: nobody has recorded the mean gates of {name_of(site)}, which has {n} experts. "
            "Pass --calibrate TEXT and --base DIR to measure them, --gates G1,...,GN, or --gates uniform."
        )
    gates = np.array([float(g) for g in cast(Sequence[float], found)], np.float32)
    if len(gates) != n or not np.isfinite(gates).all() or gates.min() < 0 or not gates.sum():
        raise MatchError(
            f"{name_of(site)}: has {n} experts, but its gates are {[float(g) for g in gates]}. Pass "
            "--gates with as many shares."
        )
    shares: Array = gates / gates.sum()
    return shares


def _expert(site: Site, i: int) -> Site:
    """One expert alone, its gate open."""

    def load() -> Mapping[str, Array]:
        held = site.load()
        return {name: np.ascontiguousarray(held[name][i]) for name in "AB"}

    config = replace(site.config, variant="lora", extra={})
    shapes = site.factors["A"].shape[1:], site.factors["B"].shape[1:]
    return _lora(site, config, shapes, load)


def _lora(
    site: Site,
    config: AdapterConfig,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    load: Callable[[], Mapping[str, Array]],
) -> Site:
    infos = {name: TensorInfo(name, "F32", s) for name, s in zip("AB", shapes, strict=True)}
    return replace(site, config=config, factors=infos, load=load, sides=(None, None))


def of_mixture(
    results: Iterable[Result],
    fixed: Collection[str],
    on_text: Mapping[str, Mapping[str, float]],
) -> Iterator[Result]:
    """What was cut off is of the mixture; the router's part is what a text has shown, if one was read."""
    lost = ("relative_error", "weight_error", "energy", "error2", "norm2", "bytes", "exact_form")
    for result in results:
        if result.name not in fixed or "relative_error" not in result.metrics:
            yield result
            continue
        of = result.metrics
        others = {
            k: v for k, v in of.items() if k not in lost and not k.startswith(("output_", "unweighted_"))
        }  # fmt: skip
        cut = {"mixture_error": of["relative_error"], "bytes": of["bytes"]}
        text = on_text.get(result.name, {})
        yield replace(result, metrics={"exact_form": 0.0, **others, **cut, **text})
