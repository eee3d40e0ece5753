"""An adapter as a runtime really reads it: the scale in B, alpha = rank, no patterns, one rank that it has room for.

Nothing is lost on the way: zeros fill ranks up, and what the runtime cannot hold is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site, Variant
from lorasurgery.errors import MatchError
from lorasurgery.model import Model
from lorasurgery.operations.algebra.svd import padded
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.operations.lint import runtime_of
from lorasurgery.operations.runtimes.claims import ONE_BY_ONE, SOME, STACKED, Runtime
from lorasurgery.operations.runtimes.dotted import dotted
from lorasurgery.operations.runtimes.experts import fitted_experts
from lorasurgery.operations.runtimes.features import features
from lorasurgery.operations.runtimes.near import reads
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# what baking mends, or what is judged by site
_MENDED = ("rsLoRA", "alpha_pattern", "rank_pattern", "DoRA", "IA3", "other variants")
# what the caller has refused or allowed before
_DECIDED = ("parts that are not understood",)


@dataclass(frozen=True, slots=True)
class Fitted:
    """The adapter for the runtime, the dialect to write it in, and what has been done to it."""

    adapter: Adapter
    dialect: str
    notes: tuple[str, ...]
    origins: tuple[Site, ...]  # which of the sites that came each of these is made of


def fit(adapter: Adapter, runtime: str, model: Model | None = None) -> Fitted:
    """Headers alone are read for LoRA; factors of other variants are loaded once, to see their rank.

    What is in `problems` is left out. The base is needed for GGUF's row order, and for kohya's names in another
    layout. Raises MatchError for what the runtime cannot hold, UnknownNameError for one that is not known.
    """
    known = runtime_of(runtime)
    dialect = known.layouts[0]
    named = Relaid(adapter, adapter.sites, ())
    if adapter.dialect == "kohya" != dialect:
        named = dotted(adapter, model, parts=dialect == "diffusers")
    adapter = named.adapter
    relaid = named.then(lambda one: fitted_experts(one, runtime, known, model))
    # what became of experts was held to the base's, which may have them in the other layout
    there = {id(site) for site in relaid.adapter.sites}
    kept = tuple(site for site in adapter.sites if id(site) in there)
    _refuse(replace(adapter, sites=kept), runtime, known, model)
    adapter = relaid.adapter
    plain = [_plain(adapter, site, runtime) for site in adapter.sites]
    ranks = _ranks(adapter, plain, runtime, known)
    sites = tuple(_sized(site, rank) for site, rank in zip(plain, ranks, strict=True))
    notes = (*relaid.notes, *_notes(adapter.sites, sites))
    config = model.config if model is not None else adapter.base_config
    settings = adapter.settings if adapter.dialect == dialect else {}
    made = replace(
        adapter, sites=sites, dialect=dialect, settings=settings, problems=(), base_config=config
    )
    return Fitted(made, dialect, notes, relaid.origins)


def _refuse(adapter: Adapter, runtime: str, known: Runtime, model: Model | None) -> None:
    """Raise for each kind of thing that is not known to be read."""
    reasons = []
    mended = (*_MENDED, *((STACKED, ONE_BY_ONE, SOME) if known.experts else ()))
    for feature in features(adapter, model):
        claim = known.claims.get(feature.name)
        if feature.name in (*mended, *_DECIDED) or (claim and claim.verdict == "ok"):
            continue
        why = claim.why if claim else "nobody has looked whether it reads them"
        more = f" and {len(feature.where) - 1} more" if feature.where[1:] else ""
        reasons.append(f"{feature.name} ({feature.where[0]}{more}): {why}")
    if reasons:
        raise MatchError(
            f"{adapter.path}: {runtime} cannot hold {'; '.join(reasons)}. Merge it, or leave it out."
        )


def _plain(adapter: Adapter, site: Site, runtime: str) -> Site:
    """The site as LoRA with scaling 1; as it is where the runtime reads its variant."""
    variant = site.config.variant
    # PEFT is what everything was written for, and reads every scale
    if reads(runtime, variant) and (variant != "lora" or runtime == "peft"):
        return site
    module = cast(Variant, plugins.load("adapters", variant))
    if variant == "lora":
        shapes = {name: info.shape for name, info in site.factors.items()}
    else:
        form = module.low_rank(site.load(), site.config)
        if form is None:
            raise MatchError(
                f"{adapter.path}: {site.module} is a {variant}, which {runtime} is not known to read and "
                "which is no product of small factors. Pass --rank and --base: the nearest LoRA of that rank "
                "is written, with its error. Or merge it."
            )
        shapes = {"A": form[0].shape, "B": form[1].shape}
    rank = shapes["A"][-2]
    facts = {name: TensorInfo(name, "F32", shape) for name, shape in shapes.items()}
    return replace(
        site,
        config=AdapterConfig("lora", rank, float(rank)),
        factors=facts,
        load=partial(_baked, site, module),
        sides=(None, None),
    )


def _baked(site: Site, variant: Variant) -> Mapping[str, Array]:
    form = variant.low_rank(site.load(), site.config)
    assert form is not None
    return dict(zip("AB", form, strict=True))


def _ranks(adapter: Adapter, sites: list[Site], runtime: str, known: Runtime) -> list[int]:
    """The rank that each site is filled up to."""
    ranks = [site.config.rank for site in sites]
    if not known.uniform or not ranks:
        return ranks
    most = max(ranks)
    room = next((rank for rank in known.ranks if rank >= most), None if known.ranks else most)
    if room is None:
        name = next(s.module for s in sites if s.config.rank == most)
        raise MatchError(
            f"{adapter.path}: {name} is of rank {most}, and {runtime} has room for {max(known.ranks)}. "
            "Prune it first."
        )
    return [room] * len(ranks)


def _sized(site: Site, rank: int) -> Site:
    """Zeros up to the rank; alpha grows with it, so that the scale stays 1."""
    if site.config.rank == rank:
        return site
    shapes = {name: list(info.shape) for name, info in site.factors.items()}
    shapes["A"][-2] = shapes["B"][-1] = rank
    facts = {name: TensorInfo(name, "F32", tuple(shape)) for name, shape in shapes.items()}
    config = AdapterConfig("lora", rank, float(rank))
    return replace(site, config=config, factors=facts, load=_filled(site, rank))


def _filled(site: Site, rank: int) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        found = site.load()
        return dict(zip("AB", padded(found["A"], found["B"], rank), strict=True))

    return load


def _notes(before: tuple[Site, ...], after: tuple[Site, ...]) -> Iterator[str]:
    both = [(one, two) for one, two in zip(before, after, strict=True) if one is not two]
    baked = sum(one.config.scaling != 1 for one, two in both if two.config.variant == "lora")
    other = sum(one.config.variant != two.config.variant for one, two in both)
    filled = sum(two.config.rank > one.config.rank for one, two in both)
    if other:
        yield f"{other} modules of other variants are written as the LoRA that they equal"
    if baked:
        yield f"the scale of {baked} modules is baked into B; alpha is the rank"
    if filled:
        yield f"{filled} modules are filled up with zeros to rank {after[0].config.rank}"
