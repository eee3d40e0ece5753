"""The processes of a torchrun, each with its share of every step's examples; one process alone is a torchrun of one.

What is trained is whole in every process, and their gradients are summed before any method or optimizer sees them:
the sums are the same bits everywhere, and so is all that follows from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from lorasurgery.errors import LoraSurgeryError, UsageError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """The number of this process, and how many there are."""

    number: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes."""
        return self.number == 0

    def mine(self, items: Sequence[T]) -> list[T]:
        """Every count-th, from this number on."""
        return list(items[self.number :: self.count])

    def check_share(self, a_step: int) -> None:
        """Raises UsageError where a step's examples cannot be shared alike."""
        if a_step % self.count:
            raise UsageError(
                f"--batch: {a_step} examples of a step cannot be shared alike by {self.count} processes. "
                f"Make --batch times --accumulate a multiple of {self.count}."
            )

    def sums(self, *values: float) -> list[float]:
        """Of all processes, in float64."""
        if self.count == 1:
            return list(values)
        return [float(value) for value in self.total(torch.tensor(values, dtype=torch.float64))]

    def total(self, held: Tensor) -> Tensor:
        """The sum of all processes' tensors of one shape."""
        if self.count == 1:
            return held
        moved = held.to(_device(), copy=True)
        distributed.all_reduce(moved)
        return moved.to(held.device)

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Each becomes the sum over all processes; it stays None where none has one."""
        if self.count == 1:
            return
        have = torch.tensor([float(p.grad is not None) for p in parameters], device=_device())
        distributed.all_reduce(have)
        shared = [p for p, known in zip(parameters, have.tolist(), strict=True) if known]
        for dtype in dict.fromkeys(p.dtype for p in shared):
            _add([p for p in shared if p.dtype == dtype])

    def share(self, value: T) -> T:
        """What the first process has."""
        if self.count == 1:
            return value
        held: list[Any] = [value]
        distributed.broadcast_object_list(held)
        return held[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        """What each process has, in their order."""
        if self.count == 1:
            return [value]
        held: list[Any] = [None] * self.count
        distributed.all_gather_object(held, value)
        return held


ALONE = Ranks()


def _add(parameters: Sequence[Tensor]) -> None:
    """One exchange for all: the factors of a model are many and small."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.reshape(-1) for g in grads])
    distributed.all_reduce(flat)
    sizes = [g.numel() for g in grads]
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.reshape(parameter.shape).clone()


def _device() -> torch.device:
    """Where the processes' messages must lie."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """The processes that torchrun started, as its environment tells; or this one alone. A group that is there is used.

    An error that a user would see is told by the first process; torchrun ends the others.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    gpu = device != "cpu" and torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("nccl" if gpu else "gloo")
    ranks = Ranks(distributed.get_rank(), count)
    try:
        yield ranks
    except (LoraSurgeryError, KeyboardInterrupt) as error:
        if ranks.first:
            raise
        raise SystemExit(getattr(error, "exit_code", 130)) from None
    finally:
        if ours:
            distributed.destroy_process_group()
