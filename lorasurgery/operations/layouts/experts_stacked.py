"""Modules of one expert each as a stack: exact, at the rank of the parts where gate and up share A, else at the sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.layouts import EXPERTS
from lorasurgery.model import Model
from lorasurgery.operations.layouts.experts import ONE, count, needed
from lorasurgery.operations.layouts.projections_fused import unscaled
from lorasurgery.operations.layouts.relaid import Relaid
from lorasurgery.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class _Stack:
    """All that adapts one stacked parameter: part -> expert -> site."""

    owner: str
    parameter: str
    parts: tuple[str, ...]
    sites: Mapping[str, Mapping[int, Site]]

    @property
    def all(self) -> list[Site]:
        return [site for of in self.sites.values() for site in of.values()]


def stacked(adapter: Adapter, model: Model | None) -> Relaid:
    """All experts of a layer as one stack; those without factors get zeros. Raises MatchError as `single`."""
    stacks = _stacks(adapter)
    if not stacks:
        raise MatchError(
            f"{adapter.path}: none of its modules is one expert of several. Leave --experts out."
        )
    model = needed(adapter, model)
    experts, shared = count(adapter, model), 0
    made, origins = list[Site](), list[Site]()
    by = {id(site): stack for stack in stacks for site in stack.all}
    for site in adapter.sites:
        stack = by.get(id(site))
        if stack is None:
            made.append(site)
        elif site is stack.all[0]:
            joined, same = _joined(adapter, stack, experts)
            shared += same
            made.append(joined)
        else:
            continue
        origins.append(site)
    note = f"{len(stacks)} stacks of {experts} experts: {shared} at the rank of their parts"
    if shared < len(stacks):
        note += f"; {len(stacks) - shared} at the sum of gate's and up's, whose A differ"
    return Relaid(replace(adapter, sites=tuple(made)), tuple(origins), (note,))


def _stacks(adapter: Adapter) -> list[_Stack]:
    found: dict[tuple[str, str, tuple[str, ...]], dict[str, dict[int, Site]]] = {}
    for site in adapter.sites:
        match = ONE.fullmatch(site.module)
        named = _named(match["part"]) if match else None
        if match is None or named is None:
            continue
        parameter, parts = named
        # transformers 5 calls the block of all models what transformers 4 called it in most
        owner = match["owner"].replace(".block_sparse_moe.", ".mlp.")
        of = found.setdefault((owner, parameter, parts), {})
        of.setdefault(match["part"], {})[int(match["expert"])] = site
    return [
        _Stack(owner, parameter, parts, {p: dict(sorted(of[p].items())) for p in parts if p in of})
        for (owner, parameter, parts), of in found.items()
    ]


def _named(part: str) -> tuple[str, tuple[str, ...]] | None:
    """Which stacked parameter a part belongs to, with all its parts in the same naming."""
    for parameter, namings in EXPERTS.items():
        for names in namings:
            if part in names:
                return parameter, names
    return None


def _joined(adapter: Adapter, stack: _Stack, experts: int) -> tuple[Site, bool]:
    """The stacked site, and whether gate and up share A in every expert."""
    first = stack.all[0]
    _check(adapter, stack, experts)
    shared = len(stack.sites) == 1 or _share(stack)
    most = [max(site.config.rank for site in of.values()) for of in stack.sites.values()]
    rank = max(most) if shared else sum(most)
    same = len({(s.config.rank, s.config.alpha, s.config.rank_stabilized) for s in stack.all}) == 1
    baked = not same or (first.config.rank_stabilized and not shared)
    alpha = first.config.alpha * (1 if shared else len(most))
    out, in_ = first.factors["B"].shape[0], first.factors["A"].shape[1]
    facts = {
        "A": TensorInfo("A", "F32", (experts, rank, in_)),
        "B": TensorInfo("B", "F32", (experts, out * len(stack.parts), rank)),
    }
    offsets = [0] * len(most) if shared else [sum(most[:i]) for i in range(len(most))]
    load = _loader(stack, facts, offsets, baked=baked)
    config = (
        unscaled(first.config, rank) if baked else replace(first.config, rank=rank, alpha=alpha)
    )
    made = replace(
        first, module=stack.owner, parameter=stack.parameter, layout="experts", config=config,
        factors=facts, load=load,
    )  # fmt: skip
    return made, shared


def _check(adapter: Adapter, stack: _Stack, experts: int) -> None:
    for site in stack.all:
        if site.config.variant != "lora" or site.size != stack.all[0].size:
            raise MatchError(
                f"{adapter.path}: {site.module} is a {site.config.variant} of {list(site.size)}: stacks are of "
                f"lora, and of one size, which is {list(stack.all[0].size)} in {stack.all[0].module}. Leave "
                "--experts out."
            )
    beyond = next((s for of in stack.sites.values() for e, s in of.items() if e >= experts), None)
    if beyond is not None:
        raise MatchError(
            f"{adapter.path}: {beyond.module} is adapted, but the base has {experts} experts. Check --base."
        )


def _share(stack: _Stack) -> bool:
    """Whether both parts of every expert have the same A."""
    first, second = stack.sites.values()
    return first.keys() == second.keys() and all(
        np.array_equal(first[e].load()["A"], second[e].load()["A"]) for e in first
    )


def _loader(
    stack: _Stack, facts: Mapping[str, TensorInfo], offsets: Sequence[int], *, baked: bool
) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        a, b = (np.zeros(facts[name].shape, np.float32) for name in "AB")
        for offset, (part, of) in zip(offsets, stack.sites.items(), strict=True):
            for expert, site in of.items():
                held = site.load()
                rank, out = len(held["A"]), len(held["B"])
                scale = np.float32(site.config.scaling if baked else 1)
                row = stack.parts.index(part) * out
                a[expert, offset : offset + rank] = held["A"]
                b[expert, row : row + out, offset : offset + rank] = held["B"] * scale
        return {"A": a, "B": b}

    return load
