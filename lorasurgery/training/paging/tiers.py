"""The memory below: a file that is mapped, for a CPU; pinned memory of the host, copied by two streams, for a GPU.

Both are two halves [2, space] of bytes, one for each moment, so that a moment of a parameter is one range of it.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lorasurgery.errors import OutputError


class Tier(Protocol):
    """Moves pages; a slot is uint8 [2, half], a page the range of bytes that it stands for."""

    @property
    def store(self) -> Tensor:
        """uint8 [2, space], settled once `settle` has returned."""
        ...

    def fetch(self, page: range, slot: Tensor) -> None: ...
    def write_back(self, page: range, slot: Tensor) -> None: ...

    def arrived(self, slot: Tensor) -> None:
        """What is computed from now on sees what was fetched into the slot."""
        ...

    def settle(self) -> None:
        """Wait for everything that was begun."""
        ...


class Mapped:
    """A file without a name in the directory for temporary files; pages of it are given back when they are copied."""

    def __init__(self, space: int) -> None:
        """Raises OutputError where the disk has no room for it."""
        home = Path(tempfile.gettempdir())
        self._space = space
        try:
            with tempfile.TemporaryFile(dir=home) as file:
                # a hole that cannot be filled later would end the process
                os.posix_fallocate(file.fileno(), 0, 2 * space)
                self._map = mmap.mmap(file.fileno(), 2 * space)
        except OSError as error:
            raise OutputError(
                f"{home}: has no room for {2 * space} bytes of optimizer state ({error.strerror}). Set TMPDIR to "
                "where there is, or raise --state-budget."
            ) from None
        self.store = torch.frombuffer(self._map, dtype=torch.uint8).view(2, space)

    def fetch(self, page: range, slot: Tensor) -> None:
        slot[:, : len(page)].copy_(self.store[:, page.start : page.stop])
        self._release(page)

    def write_back(self, page: range, slot: Tensor) -> None:
        self.store[:, page.start : page.stop].copy_(slot[:, : len(page)])
        self._release(page)

    def arrived(self, slot: Tensor) -> None:
        """A copy is over when it returns."""

    def settle(self) -> None:
        """The same."""

    def _release(self, page: range) -> None:
        """The file keeps them: what is resident of it would count as memory."""
        for half in (0, self._space):
            start = half + page.start
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (start + len(page) - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, first, length)


class Pinned:
    """Host memory that a GPU reads and writes itself, beside what it computes; nothing is managed memory."""

    def __init__(self, space: int, device: torch.device) -> None:
        self.store = torch.empty(2, space, dtype=torch.uint8, pin_memory=True)
        stream: Any = torch.cuda.Stream
        self._in, self._out = stream(device), stream(device)
        self._device = device
        self._free: dict[int, Any] = {}  # by slot: its write-back is over
        self._here: dict[int, Any] = {}  # by slot: its fetch is over
        self._kept: dict[int, Any] = {}  # by page: the host has it

    def fetch(self, page: range, slot: Tensor) -> None:
        """After the slot was written back, and after the host has the page."""
        key = slot.data_ptr()
        # what the last user of the slot has launched comes first too
        self._in.wait_stream(torch.cuda.current_stream(self._device))
        for event in (self._free.get(key), self._kept.get(page.start)):
            if event is not None:
                self._in.wait_event(event)
        with torch.cuda.stream(self._in):
            for half in (0, 1):
                source = self.store[half, page.start : page.stop]
                slot[half, : len(page)].copy_(source, non_blocking=True)
            self._here[key] = self._in.record_event()

    def write_back(self, page: range, slot: Tensor) -> None:
        """After what was computed in the slot."""
        key = slot.data_ptr()
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            for half in (0, 1):
                target = self.store[half, page.start : page.stop]
                target.copy_(slot[half, : len(page)], non_blocking=True)
            self._free[key] = self._kept[page.start] = self._out.record_event()

    def arrived(self, slot: Tensor) -> None:
        stream = torch.cuda.current_stream(self._device)
        # a slot that is filled with zeros instead of being fetched must be free as well
        for events in (self._here, self._free):
            if (event := events.get(slot.data_ptr())) is not None:
                stream.wait_event(event)

    def settle(self) -> None:
        self._in.synchronize()
        self._out.synchronize()


def below(device: torch.device, space: int) -> Tier:
    """The tier for an arena on this device."""
    return Pinned(space, device) if device.type == "cuda" else Mapped(space)
