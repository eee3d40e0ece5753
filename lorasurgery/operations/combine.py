"""One adapter of several: Σ wᵢ sᵢ BᵢAᵢ, or what TIES, DARE or pruning make of those changes.

It is the changes that are combined, not their factors: the sum of two products is no product of the sums. A
linear combination is exact, as the factors side by side; what comes of elements is the nearest of rank k.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, UsageError, ValueRangeError
from lorasurgery.model import open_model
from lorasurgery.operations._adapters import open_adapters
from lorasurgery.operations.algebra.adapter_output import (
    AdapterFormat,
    Outcome,
    check_ready,
    publish,
)
from lorasurgery.operations.algebra.bias_sites import biases_added
from lorasurgery.operations.algebra.combine_methods import METHODS, chance_of
from lorasurgery.operations.algebra.factored import Factored, factored
from lorasurgery.operations.algebra.interference import Factors, interference
from lorasurgery.operations.algebra.made import (
    kept,
    name_of,
    nbytes,
    side_by_side,
    usable,
    with_sites,
)
from lorasurgery.operations.algebra.nearest import Aim, check_rank, loss, nearest, total
from lorasurgery.operations.algebra.svd import of_product
from lorasurgery.operations.algebra.wholes import Wholes, combined
from lorasurgery.report import Report, Result
from lorasurgery.surgery import RunOptions

LINEAR = "linear"
_DENSITY = 0.5


@dataclass(frozen=True, slots=True)
class CombineOptions:
    """`density`: the share of elements that the method keeps; `rank` None: as much as the inputs together."""

    method: str = LINEAR
    density: float | None = None
    rank: int | None = None
    seed: int = 0
    base: Path | None = None
    allowed: tuple[str, ...] = ()
    form: AdapterFormat = field(default_factory=AdapterFormat)

    def check(self) -> None:
        """Raises UsageError or ValueRangeError."""
        check_rank(self.rank)
        if self.density is None:
            return
        if self.method == LINEAR:
            raise UsageError("--density: --method linear keeps all elements. Pass one of the two.")
        if not 0 < self.density <= 1:
            raise ValueRangeError(
                f"--density {self.density:g}: is no share. Pass more than 0 and at most 1."
            )

    @property
    def settings(self) -> dict[str, object]:
        return {
            "method": self.method, "density": self.density, "rank": self.rank, "seed": self.seed,
            "dtype": self.form.dtype,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Module:
    """One parameter, with the adapters that change it."""

    shares: tuple[tuple[Factored, Site, float], ...]

    @property
    def site(self) -> Site:
        """The first, whose layout the whole has."""
        of, site, _ = self.shares[0]
        return of.seen(site)

    @property
    def name(self) -> str:
        return name_of(self.shares[0][1])

    def forms(self) -> list[Factors]:
        """The factors of each change, weighed. Raises MatchError for changes of weights of two sizes."""
        found: list[Factors] = []
        for of, site, weight in self.shares:
            a, b = of.factors(site)
            found.append((a, b * b.dtype.type(weight)))
        sizes = [[*b.shape[:-1], a.shape[-1]] for a, b in found]
        for (of, _, _), size in zip(self.shares, sizes, strict=True):
            if size != sizes[0]:
                raise MatchError(
                    f"{self.name}: {self.shares[0][0].adapter.path} changes {sizes[0]}, but "
                    f"{of.adapter.path} {size}. Combine adapters of one base."
                )
        return found

    def check(self, rank: int | None) -> None:
        """Raises UsageError where nothing says how large the combined factors are to be."""
        for of, site, _ in self.shares:
            if rank is None and not of.small(site):
                raise UsageError(
                    f"{of.adapter.path}: {self.name} is {site.config.variant}, whose change has no small rank "
                    "of its own. Pass --rank: the nearest of that rank is found."
                )


def combine(
    adapters: Sequence[str], output: Path | None, options: CombineOptions, how: RunOptions
) -> Report:
    """Write one adapter of several (PATH or PATH:weight); no output: only the report.

    Raises MatchError for parts that do not fit together, UsageError for options that do not.
    """
    started = time.perf_counter()
    options.check()
    model = open_model(options.base) if options.base else None
    opened = open_adapters(adapters, model)
    inputs = {f"adapter {i}": adapter.path for i, (adapter, _) in enumerate(opened, 1)}
    inputs |= {"base": options.base} if options.base else {}
    check_ready(output, inputs, how)
    notes = [note for adapter, _ in opened for note in usable(adapter, options.allowed)]
    parts = [(factored(adapter, model), weight) for adapter, weight in opened]
    modules, wholes = _modules(parts), combined(opened)
    for module in modules:
        module.check(options.rank)
    items = [(m.name, sum(nbytes(s) for _, s, _ in m.shares), m) for m in modules]
    made = side_by_side(items, lambda module: _combine(module, options), how)
    results = tuple(result for _, result in made)
    adapter = _adapter(opened, [site for site, _ in made], wholes)
    adapter = biases_added(replace(adapter, base_config=model.config) if model else adapter)
    shown = {"adapters": [f"{a.path}:{w:g}" for a, w in opened], **options.settings}
    outcome = Outcome(
        "combine", adapter, inputs, shown, results,
        {"modules": len(made), **total(results), **_means(results)},
        (*notes, *_bases(opened)), started,
    )  # fmt: skip
    return publish(outcome, output, options.form, how)


def _modules(parts: Sequence[tuple[Factored, float]]) -> list[_Module]:
    found: dict[str, list[tuple[Factored, Site, float]]] = {}
    for of, weight in parts:
        for site in of.adapter.sites:
            found.setdefault(name_of(site), []).append((of, site, weight))
    return [_Module(tuple(shares)) for shares in found.values()]


def _combine(module: _Module, options: CombineOptions) -> tuple[Site, Result]:
    forms = module.forms()
    work = _linear if options.method == LINEAR else _by_elements(module.name, options)
    a, b, error2, norm2 = work(forms, options.rank)
    metrics = {"rank": float(a.shape[-2]), **loss(error2, norm2), **interference(forms)}
    return kept(module.site, a, b), Result(module.name, metrics, {}, {})


def _linear(forms: Sequence[Factors], rank: int | None) -> tuple[Array, Array, float, float]:
    """The factors side by side, and of that product the first singular triplets."""
    a = np.concatenate([a for a, _ in forms], axis=-2)
    b = np.concatenate([b for _, b in forms], axis=-1)
    found = of_product(a, b)
    # what float32 factors can tell from zero
    floor = found.s.max(initial=0.0) * np.finfo(np.float32).eps
    full = max(1, int((found.s > floor).reshape(-1, found.s.shape[-1]).any(axis=0).sum()))
    wanted = min(rank or full, full)
    squares = np.square(found.s)
    return *found.factors(wanted), float(squares[..., wanted:].sum()), float(squares.sum())


def _by_elements(
    name: str, options: CombineOptions
) -> Callable[[Sequence[Factors], int | None], tuple[Array, Array, float, float]]:
    def work(forms: Sequence[Factors], rank: int | None) -> tuple[Array, Array, float, float]:
        density = _DENSITY if options.density is None else options.density
        deltas = [b @ a for a, b in forms]
        delta = METHODS[options.method](deltas, density, chance_of(name, options.seed))
        return nearest(delta, Aim(rank or sum(a.shape[-2] for a, _ in forms)))

    return work


def _adapter(
    opened: Sequence[tuple[Adapter, float]], sites: Sequence[Site], wholes: Wholes
) -> Adapter:
    first = opened[0][0]
    return replace(
        with_sites(first, sites),
        replaced={n: a.replaced[n] for n, a in wholes.replaced.items()},
        load=lambda name: wholes.replaced[name].load(name),
        added=wholes.added, load_added=wholes.load_added,
    )  # fmt: skip


def _means(results: Sequence[Result]) -> Mapping[str, float]:
    """Over the modules that more than one adapter changes."""
    shared = [r.metrics for r in results if "cosine" in r.metrics]
    if not shared:
        return {}
    mean = {k: sum(m[k] for m in shared) / len(shared) for k in ("cosine", "sign_conflict")}
    return {"shared_modules": len(shared), **mean}


def _bases(opened: Sequence[tuple[Adapter, float]]) -> list[str]:
    names = sorted({str(a.base) for a, _ in opened if a.base})
    return [f"the adapters name different bases: {', '.join(names)}."] if len(names) > 1 else []
