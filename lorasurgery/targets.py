"""An adapter's sites laid upon a checkpoint's tensors: every factor gets a place, or a problem."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site, Variant
from lorasurgery.layouts import CONV1D, TURNED_EXPERTS
from lorasurgery.naming import Names, Part
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.change import Change, Fused, LowRank, Merged, Rows
    from lorasurgery.model import Model


@dataclass(frozen=True, slots=True)
class Share:
    """What one site does to one tensor: its factors times `weight`, turned if W is stored [in, out]."""

    site: Site
    part: Part
    info: TensorInfo  # of the tensor
    turned: bool
    weight: float = 1.0

    @property
    def variant(self) -> Variant:
        return cast(Variant, plugins.load("adapters", self.site.config.variant))

    def factors(self) -> tuple[Array, Array] | None:
        """A float32 [n, k, columns] and B [n, rows, k] with the tensor's change B A, or None.

        n is the number of experts, or 1; None where the variant has no such form.
        """
        form = self.variant.low_rank(self.site.load(), self.site.config)
        if form is None:
            return None
        a, b = form
        if a.ndim == 2:
            a, b = a[None], b[None]
        if self.part.expert is not None:
            a, b = a[self.part.expert : self.part.expert + 1], b[[self.part.expert]]
        if self.part.rows is not None:
            b = b[:, slice(*self.part.rows)]
        if self.weight != 1.0:
            b = b * b.dtype.type(self.weight)
        if self.turned:
            a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
        return a, b

    def dense(self, w: Array) -> Array:
        """The change of a weight float32 [n, rows, columns] that other shares may have changed already."""
        seen = w.transpose(0, 2, 1) if self.turned else w
        one = seen[0] if len(seen) == 1 else seen
        delta = self.variant.delta(one, self.site.load(), self.site.config).reshape(seen.shape)
        weighed: Array = delta * delta.dtype.type(self.weight)
        return weighed.transpose(0, 2, 1) if self.turned else weighed

    @property
    def by_rows(self) -> bool:
        """Whether each row of the change is made of the same row of the tensor."""
        names = getattr(self.variant, "ROWS", ())
        whole = self.part.expert is None and self.site.layout != "experts" and not self.turned
        factors, rows = self.site.factors, self.info.shape[0] if self.info.shape else 1
        return whole and bool(names) and all(factors[name].shape[0] == rows for name in names)

    def fused(self) -> Fused | None:
        """What merges a few rows in one pass, if the variant can and nothing weighs it."""
        variant, config, factors = self.variant, self.site.config, dict(self.site.load())
        merge, names = getattr(variant, "merge", None), getattr(variant, "ROWS", ())
        if merge is None or self.weight != 1.0:
            return None

        def run(w: Array, start: int, dtype: Any, chance: tuple[int | None, int]) -> Merged:
            of = {n: f[start : start + len(w)] if n in names else f for n, f in factors.items()}
            merged: Merged = merge(w, of, config, dtype, chance)
            return merged

        return run

    def some(self) -> Callable[[Array, int], Array]:
        """What makes the change of a few rows, from them and the number of their first."""
        variant, config, factors = self.variant, self.site.config, dict(self.site.load())
        names = getattr(variant, "ROWS", ())

        def make(w: Array, start: int) -> Array:
            of = {n: f[start : start + len(w)] if n in names else f for n, f in factors.items()}
            delta = variant.delta(w, of, config)
            return delta if self.weight == 1.0 else delta * delta.dtype.type(self.weight)

        return make


@dataclass(frozen=True, slots=True)
class Target:
    """All that adapters do to one tensor."""

    tensor: str
    shares: tuple[Share, ...]

    def change(self, weight: Rows | None = None, *, own: bool = False) -> Change:
        """What is added to the weight that `weight` reads.

        Low-rank shares lie side by side: a sum of products is a product of rank r1 + r2. A change that
        is no such product is made of the weight, one share after another, row by row if it can be;
        where `weight` is None, it cannot be known, and is nothing. `own`: it is added to that weight.
        """
        import numpy as np

        from lorasurgery.change import ByRows, Dense, LowRank, widened

        forms = [share.factors() for share in self.shares]
        pairs = [form for form in forms if form is not None]
        if len(pairs) == len(forms):
            a = np.concatenate([a for a, _ in pairs], axis=1)
            b = np.concatenate([b for _, b in pairs], axis=2)
            return LowRank(np.ascontiguousarray(a), np.ascontiguousarray(b))
        if weight is None:
            return LowRank.nothing(self.shares[0].info)
        info = self.shares[0].info
        rows = info.shape[0] if info.shape else 1
        if all(share.by_rows for share in self.shares):
            fused = self.shares[0].fused() if own and len(self.shares) == 1 else None
            return ByRows(self._by_rows(weight), rows, info.numel // max(1, rows), fused)
        w = widened(weight(0, rows))
        total = w.copy()
        for share in self.shares:
            total += share.dense(total)
        return Dense(total - w)

    def _by_rows(self, weight: Rows) -> Rows:
        first, *others = [share.some() for share in self.shares]

        def make(start: int, stop: int) -> Array:
            read = weight(start, stop)
            w = read.astype("f4", copy=False).reshape(len(read) if read.ndim else 1, -1)
            delta = first(w, start)
            for other in others:
                delta = delta + other(w + delta, start)
            return delta

        return make


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that comes from the adapter (`name` there), to replace one or to be added to one."""

    adapter: Adapter
    name: str
    info: TensorInfo
    weight: float = 1.0
    added: bool = False

    def load(self) -> Array:
        return (self.adapter.load_added if self.added else self.adapter.load)(self.name)


def same_values(one: Whole, other: Whole | None) -> bool:
    """Whether two adapters bring the same tensor along: the base's own, beside what adapts it."""
    import numpy as np

    if other is None or one.info.shape != other.info.shape:
        return False
    return bool(np.array_equal(one.load(), other.load()))


def bias_change(wholes: Sequence[Whole]) -> LowRank:
    """The weighted sum of what is added to a bias, as a change of rank 1."""
    import numpy as np

    from lorasurgery.change import LowRank

    values = np.sum([whole.load() * np.float32(whole.weight) for whole in wholes], axis=0)
    return LowRank(np.ones((1, 1, 1), np.float32), values.astype(np.float32).reshape(1, -1, 1))


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where everything goes. Tensors named here that the checkpoint lacks are new ones."""

    targets: Mapping[str, Target]
    replaced: Mapping[str, Whole]
    added: Mapping[str, tuple[Whole, ...]]
    missing: Mapping[str, Site]  # live parameters that no tensor holds: tied heads, or mistakes
    problems: tuple[Problem, ...]


def resolve(model: Model, adapter: Adapter, weight: float = 1.0) -> Resolved:
    """Lay one adapter upon a model; nothing is raised, all that does not fit is a problem."""
    live = [f"{site.module}.{site.parameter}" for site in adapter.sites]
    names = Names(model.weights, [*live, *adapter.replaced, *adapter.added])
    adapter = _completed(model, adapter, names)
    problems = list(adapter.problems)
    shares: dict[str, list[Share]] = defaultdict(list)
    missing = {}
    for name, site in zip(live, adapter.sites, strict=True):
        if routed := _routed(site):
            problems.append(routed)
            continue
        parts = names.parts(name, site.size[0] or 0, site.experts)
        if not parts and not site.optional:
            missing[name] = site
        for part in parts:
            turned = _orientation(model, site, part)
            if turned is None:
                problems.append(_misfit(model, site, part))
            else:
                info = model.weights.info(part.tensor)
                shares[part.tensor].append(Share(site, part, info, turned, weight))
    replaced, added = {}, {}
    for name, info in adapter.replaced.items():
        replaced[names.find(name) or name] = Whole(adapter, name, info, weight)
    for name, info in adapter.added.items():
        stored = names.find(name)
        if stored is None or model.weights.info(stored).shape != info.shape:
            problems.append(_no_bias(model, name, info, stored))
        else:
            added[stored] = (Whole(adapter, name, info, weight, added=True),)
    targets = {tensor: Target(tensor, tuple(of)) for tensor, of in shares.items()}
    return Resolved(targets, replaced, added, missing, tuple(problems))


def _routed(site: Site) -> Problem | None:
    """A problem where what a site does depends on the token."""
    if not getattr(plugins.load("adapters", site.config.variant), "ROUTED", False):
        return None
    return Problem(
        next(iter(site.factors.values())).name,
        f"{site.module}: a router chooses among its experts for each token, so no merged weight does "
        "the same; convert it first, with --mixture mean, top or experts",
    )


def completed(model: Model, adapter: Adapter) -> Adapter:
    """The adapter with the factors that only the base's shapes tell."""
    live = [f"{site.module}.{site.parameter}" for site in adapter.sites]
    return _completed(model, adapter, Names(model.weights, live))


def _completed(model: Model, adapter: Adapter, names: Names) -> Adapter:
    if adapter.complete is None:
        return adapter
    live = [f"{site.module}.{site.parameter}" for site in adapter.sites]
    found = {name: stored for name in live if (stored := names.find(name))}
    return adapter.complete({n: model.weights.info(stored).shape for n, stored in found.items()})


def unmatched(model: Model, resolved: Resolved) -> list[Problem]:
    """A problem for each site that no tensor holds."""
    names = Names(model.weights, list(resolved.missing))
    return [
        Problem(
            next(iter(site.factors.values())).name,
            f"{name} is adapted, but {model.path} has no such tensor. {names.nearest(name)[:-1]}",
        )
        for name, site in resolved.missing.items()
    ]


def combine(parts: Sequence[Resolved]) -> Resolved:
    """Several adapters at once: their changes of a tensor add up; two replacements are a problem."""
    targets: dict[str, Target] = {}
    replaced: dict[str, Whole] = {}
    added: dict[str, tuple[Whole, ...]] = {}
    problems = [p for part in parts for p in part.problems]
    for part in parts:
        for tensor, target in part.targets.items():
            before = targets[tensor].shares if tensor in targets else ()
            targets[tensor] = replace(target, shares=before + target.shares)
        for tensor, whole in part.replaced.items():
            if tensor in replaced and not same_values(replaced[tensor], whole):
                problems.append(Problem(tensor, f"{tensor}: two adapters replace it as a whole"))
            replaced[tensor] = whole
        for tensor, wholes in part.added.items():
            added[tensor] = added.get(tensor, ()) + wholes
    missing = {name: site for part in parts for name, site in part.missing.items()}
    return Resolved(targets, replaced, added, missing, tuple(problems))


def _orientation(model: Model, site: Site, part: Part) -> bool | None:
    """Whether W is stored turned, [in, out]; None if the factors fit neither way."""
    info = model.weights.info(part.tensor)
    out, in_ = site.size
    if part.rows is not None:
        out = part.rows[1] - part.rows[0]
    stack = site.layout == "experts" and part.expert is None
    if stack and (len(info.shape) != 3 or info.shape[0] != site.experts):
        return None
    if stack:
        _, rows, columns = info.shape
    else:  # a convolution's weight is [out, in, ...]
        rows = info.shape[0] if info.shape else 1
        columns = info.numel // max(1, rows)
    if site.layout == "channels":
        columns = info.shape[1] if len(info.shape) > 1 else 1
    straight = out in (None, rows) and in_ in (None, columns)
    turned = out in (None, columns) and in_ in (None, rows)
    if straight and turned:
        return _turned_by_name(model.config, site)
    if turned and not _may_turn(model.config, site):
        return None
    return turned if straight or turned else None


def _may_turn(config: Mapping[str, Any], site: Site) -> bool:
    if site.layout == "linear":
        return site.fan_in_fan_out or _is_conv1d(config, site)
    return site.layout == "experts"


def _turned_by_name(config: Mapping[str, Any], site: Site) -> bool:
    """Square weights: only the architecture, or else the trainer's flag, can tell."""
    kind = str(config.get("model_type", ""))
    if site.layout == "experts":
        return kind in TURNED_EXPERTS
    if kind in CONV1D:
        return _is_conv1d(config, site)
    return site.layout == "linear" and site.fan_in_fan_out


def _is_conv1d(config: Mapping[str, Any], site: Site) -> bool:
    names = CONV1D.get(str(config.get("model_type", "")), ())
    return site.layout == "linear" and site.module.rpartition(".")[2] in names


def _misfit(model: Model, site: Site, part: Part) -> Problem:
    info = model.weights.info(part.tensor)
    if site.sides != (None, None) or "A" not in site.factors:
        first = next(iter(site.factors.values()))
        size = ", ".join("any" if side is None else str(side) for side in site.sides)
        return Problem(
            first.name,
            f"{site.module}: the factors are of a weight of [{size}], but {part.tensor} in "
            f"{model.path} is {list(info.shape)}",
        )
    a, b = site.factors["A"], site.factors["B"]
    return Problem(
        a.name,
        f"{site.module}: A {list(a.shape)} and B {list(b.shape)} make a change of "
        f"[{b.shape[-2]}, {a.shape[-1]}], but {part.tensor} in {model.path} is {list(info.shape)}",
    )


def _no_bias(model: Model, name: str, info: TensorInfo, stored: str | None) -> Problem:
    if stored is None:
        return Problem(name, f"{name}: the adapter adds a bias, but {model.path} has none there")
    shape = list(model.weights.info(stored).shape)
    return Problem(name, f"{name}: the adapter adds {list(info.shape)} to a bias of {shape}")
