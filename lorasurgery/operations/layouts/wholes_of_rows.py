"""Biases, and tensors that an adapter keeps whole, of projections that are split or fused: their rows go along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorasurgery.adapter import Adapter
from lorasurgery.errors import MatchError
from lorasurgery.operations.layouts.fused_rows import Fused, Rows
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array
    from lorasurgery.operations.layouts.projections_fused import Group

Load = Callable[[str], "Array"]
# what a tensor is called, what is known of it, and what gives it
_Held = tuple[TensorInfo, Callable[[], "Array"]]


def split_wholes(adapter: Adapter, splits: Mapping[str, tuple[Fused, Rows]]) -> Adapter:
    """`splits`: by fused module."""
    replaced = _apart(adapter.replaced, adapter.load, splits)
    added = _apart(adapter.added, adapter.load_added, splits)
    return _with(adapter, replaced, added)


def fused_wholes(adapter: Adapter, groups: Sequence[Group]) -> Adapter:
    """What is added to no part is zero; raises MatchError where some parts' tensors alone are kept whole."""
    replaced = _together(adapter, groups, adapter.replaced, adapter.load, zeros=False)
    added = _together(adapter, groups, adapter.added, adapter.load_added, zeros=True)
    return _with(adapter, replaced, added)


def _with(adapter: Adapter, replaced: dict[str, _Held], added: dict[str, _Held]) -> Adapter:
    return replace(
        adapter,
        replaced={name: info for name, (info, _) in replaced.items()},
        added={name: info for name, (info, _) in added.items()},
        load=lambda name: replaced[name][1](),
        load_added=lambda name: added[name][1](),
    )


def _apart(
    infos: Mapping[str, TensorInfo], load: Load, splits: Mapping[str, tuple[Fused, Rows]]
) -> dict[str, _Held]:
    found: dict[str, _Held] = {}
    for name, info in infos.items():
        module, _, parameter = name.rpartition(".")
        if module not in splits:
            found[name] = (info, _whole(load, name))
            continue
        fused, lie = splits[module]
        for i, part in enumerate(fused.parts):
            new = f"{module.removesuffix(fused.name)}{part}.{parameter}"
            shape = (lie.count(i), *info.shape[1:])
            found[new] = (TensorInfo(new, info.dtype, shape), _rows(load, name, lie.of(i)))
    return found


def _together(
    adapter: Adapter,
    groups: Sequence[Group],
    infos: Mapping[str, TensorInfo],
    load: Load,
    *,
    zeros: bool,
) -> dict[str, _Held]:
    found = {name: (info, _whole(load, name)) for name, info in infos.items()}
    for group in groups:
        for parameter in ("weight", "bias"):
            names = [f"{group.owner}{part}.{parameter}" for part in group.fused.parts]
            there = [name for name in names if name in infos]
            if not there:
                continue
            if len(there) < len(names) and not zeros:
                missing = next(name for name in names if name not in infos)
                raise MatchError(
                    f"{adapter.path}: {there[0]} is replaced as a whole, and {missing} beside it is not, so "
                    f"that {group.module} cannot be. Merge it."
                )
            for name in there:
                del found[name]
            some = infos[there[0]]
            new = f"{group.module}.{parameter}"
            info = TensorInfo(new, some.dtype, (group.rows.total, *some.shape[1:]))
            found[new] = (info, _gathered(load, names, there, group.rows, info))
    return found


def _whole(load: Load, name: str) -> Callable[[], Array]:
    return lambda: load(name)


def _rows(load: Load, name: str, index: Array) -> Callable[[], Array]:
    return lambda: np.ascontiguousarray(load(name)[index])


def _gathered(
    load: Load, names: Sequence[str], there: Sequence[str], lie: Rows, info: TensorInfo
) -> Callable[[], Array]:
    def gather() -> Array:
        held = {name: load(name) for name in there}
        made = np.zeros(info.shape, held[there[0]].dtype)
        for i, name in enumerate(names):
            if name in held:
                made[lie.of(i)] = held[name]
        return made

    return gather
