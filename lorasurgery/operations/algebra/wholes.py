"""What several adapters bring along beside factors: tensors that replace the base's, biases that add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorasurgery.adapter import Adapter
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.operations.algebra.made import name_of
from lorasurgery.tensors import TensorInfo


@dataclass(frozen=True, slots=True)
class Wholes:
    """`replaced`: the adapter that each such tensor comes from; `added`: sums over adapters."""

    replaced: Mapping[str, Adapter]
    added: Mapping[str, TensorInfo]
    load_added: Callable[[str], Array]


def combined(opened: Sequence[tuple[Adapter, float]]) -> Wholes:
    """Raises MatchError for two that replace one tensor differently, UsageError for a weighed one."""
    replaced: dict[str, Adapter] = {}
    for adapter, weight in opened:
        # beside factors it is the base's own tensor
        adapted = {name_of(site) for site in adapter.sites}
        for name in adapter.replaced:
            if weight != 1 and name not in adapted:
                raise UsageError(
                    f"{adapter.path}: replaces {name} as a whole, which cannot be weighed by "
                    f"{weight:g}. Give it the weight 1."
                )
            _check_same(replaced.get(name), adapter, name)
            replaced[name] = adapter
    added = {name: info for adapter, _ in opened for name, info in adapter.added.items()}

    def load_added(name: str) -> Array:
        parts = [a.load_added(name) * np.float32(w) for a, w in opened if name in a.added]
        return np.asarray(np.sum(parts, axis=0, dtype=np.float32))

    return Wholes(replaced, added, load_added)


def _check_same(one: Adapter | None, other: Adapter, name: str) -> None:
    if one is None:
        return
    alike = one.replaced[name].shape == other.replaced[name].shape
    if not alike or not np.array_equal(one.load(name), other.load(name)):
        raise MatchError(
            f"{name}: {one.path} and {other.path} both replace it as a whole, by different values. "
            "Take it out of one of them."
        )
