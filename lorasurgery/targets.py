"""An adapter's sites laid upon a checkpoint's tensors: every factor gets a place, or a problem."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, BaseFacts, Site
from lorasurgery.naming import Names
from lorasurgery.orientation import misfit, orientation, parts_of
from lorasurgery.problems import Problem
from lorasurgery.target import Share, Target
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.change import LowRank
    from lorasurgery.model import Model


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


def resolve(
    model: Model, adapter: Adapter, weight: float = 1.0, *, routed: bool = False
) -> Resolved:
    """Lay one adapter upon a model; nothing is raised, all that does not fit is a problem.

    `routed`: what depends on the token has a place too, where it is not to be merged.
    """
    adapter = completed(model, adapter)
    live = [f"{site.module}.{site.parameter}" for site in adapter.sites]
    names = Names(model.weights, [*live, *adapter.replaced, *adapter.added])
    problems = list(adapter.problems)
    shares: dict[str, list[Share]] = defaultdict(list)
    missing = {}
    for name, site in zip(live, adapter.sites, strict=True):
        if not routed and (problem := _routed(site)):
            problems.append(problem)
            continue
        parts = parts_of(model, names, name, site)
        if not parts and not site.optional:
            missing[name] = site
        wrong = [part for part in parts if orientation(model, site, part) is None]
        problems += [misfit(model, site, part) for part in wrong[:1]]
        for part in () if wrong else parts:
            info, turned = model.weights.info(part.tensor), orientation(model, site, part)
            shares[part.tensor].append(Share(site, part, info, bool(turned), weight))
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
    """The adapter with the factors that only the base tells."""
    if adapter.complete is None:
        return adapter

    def stored(names: Sequence[str]) -> dict[str, str]:
        find = Names(model.weights, names).find
        return {name: tensor for name in names if (tensor := find(name))}

    def shapes(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        return {name: model.weights.info(tensor).shape for name, tensor in stored(names).items()}

    def read(name: str) -> Array:
        return model.weights.read(stored([name])[name])

    return adapter.complete(BaseFacts(model.config, shapes, read))


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


def _no_bias(model: Model, name: str, info: TensorInfo, stored: str | None) -> Problem:
    if stored is None:
        return Problem(name, f"{name}: the adapter adds a bias, but {model.path} has none there")
    shape = list(model.weights.info(stored).shape)
    return Problem(name, f"{name}: the adapter adds {list(info.shape)} to a bias of {shape}")
