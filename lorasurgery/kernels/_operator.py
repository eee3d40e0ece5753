"""A kernel as an operator of torch: one node of a graph, whose results' shapes are known before it runs.

Those that are trained through have a gradient besides: `_ops`, `_dora_ops`. Through these none flows.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lorasurgery.kernels._tensors import dispatch

Call = Callable[..., Any]


def constant(kernel: ModuleType, schema: str, fake: Call) -> Call:
    """What calls torch.ops.lorasurgery.KERNEL as `run` is called; `fake` makes results without data."""

    def call(*args: Any) -> Any:
        return _found(kernel, args)

    return _defined(kernel, schema, call, fake)


def measured(kernel: ModuleType, schema: str, fake: Call) -> Call:
    """The same for a kernel that gives three sums last: its operator has them as one float64 [3]."""

    def call(*args: Any) -> Any:
        *made, signal, power, noise2 = _found(kernel, args)
        sums = torch.tensor((signal, power, noise2), dtype=torch.float64, device=args[0].device)
        return (*made, sums) if made else sums

    form = _defined(kernel, schema, call, fake)

    def with_numbers(*args: Any) -> tuple[Any, ...]:
        found = form(*args)
        *made, sums = found if isinstance(found, tuple) else (found,)
        return (*made, *sums.tolist())

    return with_numbers


def _found(kernel: ModuleType, args: tuple[Any, ...]) -> Any:
    return dispatch(kernel.cpu, getattr(kernel, "launch", kernel.reference), *args)


def _defined(kernel: ModuleType, schema: str, call: Call, fake: Call) -> Call:
    name = kernel.__name__.rpartition(".")[2]
    made = torch.library.custom_op(
        f"lorasurgery::{name}", call, mutates_args=(), schema=schema
    )  # fmt: skip
    made.register_fake(fake)

    def form(*args: Any) -> Any:
        return made(*map(_plain, args))

    return form


def _plain(argument: Any) -> Any:
    """Without a gradient; a seed modulo 2^64, as operators hold integers."""
    if isinstance(argument, Tensor):
        return argument.detach()
    if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
        return (argument + (1 << 63)) % (1 << 64) - (1 << 63)
    return argument
