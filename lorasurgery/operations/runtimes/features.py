"""What of an adapter goes beyond plain LoRA matrices of one rank and one alpha, and in which modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorasurgery import targets
from lorasurgery.adapter import Adapter, Site
from lorasurgery.layouts import HEADS
from lorasurgery.model import Model
from lorasurgery.operations.layouts.experts import is_one, is_stacked
from lorasurgery.operations.runtimes.claims import ONE_BY_ONE, SOME, STACKED
from lorasurgery.operations.runtimes.experts import some_missing
from lorasurgery.targets import unmatched

# what is told by itself
_NAMED = ("lora", "dora", "ia3")


@dataclass(frozen=True, slots=True)
class Feature:
    """`where` it is; `scales`: whether alpha / r of the usual module is not what these are scaled by."""

    name: str
    where: tuple[str, ...]
    scales: bool = False


def features(adapter: Adapter, model: Model | None = None) -> list[Feature]:
    """Those that the adapter has; with its base also what does not fit to it."""
    found = [*_of_sites(adapter.sites), *_of_wholes(adapter)]
    found.append(Feature(SOME, some_missing(adapter, model)))
    if adapter.problems:
        found.append(
            Feature("parts that are not understood", tuple(p.name for p in adapter.problems))
        )
    if model is not None:
        found += _of_base(adapter, model)
    return [feature for feature in found if feature.where]


def usual(sites: Iterable[Site]) -> tuple[int, float]:
    """The most common rank, and the most common alpha: what a config says once for all."""
    ranks, alphas = Counter[int](), Counter[float]()
    for site in sites:
        ranks[site.config.rank] += 1
        alphas[site.config.alpha] += 1
    return (
        ranks.most_common(1)[0][0] if ranks else 1,
        alphas.most_common(1)[0][0] if alphas else 1.0,
    )


def _of_sites(sites: tuple[Site, ...]) -> Iterable[Feature]:
    rank, alpha = usual(sites)
    tests: Mapping[str, Callable[[Site], bool]] = {
        "rsLoRA": lambda s: s.config.rank_stabilized,
        "alpha_pattern": lambda s: s.config.alpha != alpha,
        "rank_pattern": lambda s: s.config.rank != rank,
        "DoRA": lambda s: s.config.variant == "dora",
        "IA3": lambda s: s.config.variant == "ia3",
        "other variants": lambda s: s.config.variant not in _NAMED,
        "embeddings": lambda s: s.layout == "embedding",
        "target_parameters": lambda s: s.layout == "parameter" and not is_stacked(s),
        STACKED: is_stacked,
        ONE_BY_ONE: is_one,
        "convolutions": lambda s: bool(s.kernel),
    }
    # an rsLoRA without r and alpha of its own is scaled by what the flag says of the usual two
    scale = {
        stabilized: alpha / (rank**0.5 if stabilized else rank) for stabilized in (False, True)
    }
    for name, test in tests.items():
        some = [s for s in sites if test(s)]
        differs = any(s.config.scaling != scale[s.config.rank_stabilized] for s in some)
        yield Feature(name, tuple(s.module for s in some), scales=differs)


def _of_wholes(adapter: Adapter) -> Iterable[Feature]:
    adapted = {f"{site.module}.{site.parameter}" for site in adapter.sites}
    biases = tuple(name for name in adapter.replaced if name.endswith(".bias"))
    # beside factors stands the base's own embedding
    others = tuple(n for n in adapter.replaced if n not in biases and n not in adapted)
    yield Feature("modules_to_save", others)
    yield Feature("bias", biases)
    yield Feature("lora_bias", tuple(adapter.added))


def _of_base(adapter: Adapter, model: Model) -> Iterable[Feature]:
    resolved = targets.resolve(model, adapter)
    known = {problem.name for problem in adapter.problems}
    missing = [p.name for p in unmatched(model, resolved)]
    missing += [p.name for p in resolved.problems if p.name not in known]
    yield Feature("modules that the base lacks", tuple(missing))
    if model.config.get("tie_word_embeddings"):
        heads = [s.module for s in adapter.sites if f"{s.module}.{s.parameter}".endswith(HEADS)]
        yield Feature("tied head", tuple(heads))
