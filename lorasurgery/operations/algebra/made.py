"""What algebra on adapters works with: modules as factors of rank k, and adapters made of such."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar, cast

import numpy as np

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site, Variant
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, ValueRangeError
from lorasurgery.problems import Problem, refuse
from lorasurgery.surgery import RunOptions
from lorasurgery.tensors import TensorInfo

I = TypeVar("I")  # noqa: E741 - an item
T = TypeVar("T")


def name_of(site: Site) -> str:
    """The adapted parameter's path."""
    return f"{site.module}.{site.parameter}"


def variant_of(site: Site) -> Variant:
    """The variant of a site's config."""
    return cast(Variant, plugins.load("adapters", site.config.variant))


def pair(site: Site) -> tuple[Array, Array] | None:
    """A float32 [..., k, in] and B [..., out, k] with the site's change B A; None if it is no such product."""
    return variant_of(site).low_rank(site.load(), site.config)


def low_rank(adapter: Adapter, site: Site) -> tuple[Array, Array]:
    """`pair`; raises MatchError where there is none, ValueRangeError for nan or inf."""
    form = pair(site)
    if form is None:
        raise MatchError(
            f"{adapter.path}: {name_of(site)} is {site.config.variant}, whose change is no product of "
            "small factors. Convert it first: lorasurgery convert --to lora."
        )
    check_finite(adapter, site, *form)
    return form


def check_finite(adapter: Adapter, site: Site, *arrays: Array) -> None:
    """Raises ValueRangeError for nan or inf."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise ValueRangeError(
            f"{adapter.path}: the change of {name_of(site)} is nan or infinite. Look for it in its "
            "factors."
        )


def lora_site(
    site: Site,
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    load: Callable[[], tuple[Array, Array]],
) -> Site:
    """The same parameter, changed by B A: scaling 1, that is alpha = rank; `shapes` of A and B."""  # fmt: skip
    a, b = shapes
    config = AdapterConfig("lora", a[-2], float(a[-2]))
    infos = {"A": TensorInfo("A", "F32", a), "B": TensorInfo("B", "F32", b)}

    def factors() -> Mapping[str, Array]:
        return dict(zip("AB", load(), strict=True))

    return replace(site, config=config, factors=infos, load=factors, sides=(None, None))


def with_sites(adapter: Adapter, sites: Sequence[Site]) -> Adapter:
    """The adapter with these sites; what was set for one variant says nothing of another."""
    same = {s.config.variant for s in sites} <= {s.config.variant for s in adapter.sites}
    settings = adapter.settings if same else {"task_type": adapter.settings.get("task_type")}
    return replace(adapter, sites=tuple(sites), settings=settings, problems=())


def kept(site: Site, a: Array, b: Array) -> Site:
    """A site whose factors are at hand."""
    return lora_site(site, (a.shape, b.shape), lambda: (a, b))


def remembering(load: Callable[[], T]) -> Callable[[], T]:
    """A loader that is asked twice in a row, for A and for B, and computes once."""
    held: list[T] = []

    def once() -> T:
        if held:
            return held.pop()
        held.append(load())
        return held[0]

    return once


def usable(adapter: Adapter, allowed: Sequence[str]) -> tuple[str, ...]:
    """Notes on what is left out of an adapter. Raises MatchError for what may not be."""
    left: list[Problem] = refuse(adapter.path, adapter.problems, allowed)
    return tuple(f"left out: {problem.message}" for problem in left)


def each(sites: Sequence[Site], work: Callable[[Site], T], how: RunOptions) -> list[T]:
    """Work on sites side by side, with progress in their bytes, results in their order."""
    return side_by_side([(name_of(s), nbytes(s), s) for s in sites], work, how)


def side_by_side(
    items: Sequence[tuple[str, int, I]], work: Callable[[I], T], how: RunOptions
) -> list[T]:
    """Work on items (name, bytes, item) in threads, with progress, results in their order."""
    total, done = sum(size for _, size, _ in items), 0
    results: list[T] = []
    with ThreadPoolExecutor(how.workers) as pool:
        made = pool.map(work, [item for _, _, item in items])
        for (name, size, _), result in zip(items, made, strict=True):
            done += size
            how.progress(done, total, name)
            results.append(result)
    return results


def nbytes(site: Site) -> int:
    """Of all factors, as they will be written."""
    return sum(info.nbytes for info in site.factors.values())


def distinct(sites: Iterable[Site]) -> list[Site]:
    """Of those that share factors, the first: so often they are stored."""
    by: dict[object, Site] = {}
    for site in sites:
        by.setdefault(site.config.extra.get("shared") or name_of(site), site)
    return list(by.values())


def parameters(sites: Iterable[Site]) -> int:
    """How many numbers the factors are."""
    return sum(info.numel for site in sites for info in site.factors.values())
