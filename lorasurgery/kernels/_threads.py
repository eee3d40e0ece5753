"""Rows of a kernel's result over threads: as many as torch was told to use, or as there are processors."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def count() -> int:
    """torch.get_num_threads() where torch is loaded, else the processors that are ours to use."""
    torch = sys.modules.get("torch")
    asked = getattr(torch, "get_num_threads", None)
    return int(asked()) if asked else len(os.sched_getaffinity(0))


def over_rows(work: Callable[[int, int], object], rows: int, least: int) -> None:
    """Call work(start, stop) over all rows; side by side where each has `least` rows or more."""
    threads = min(count(), rows // max(1, least))
    if threads < 2:
        work(0, rows)
        return
    edges = [rows * t // threads for t in range(threads + 1)]
    others = [_pool(threads).submit(work, *edges[t : t + 2]) for t in range(1, threads)]
    work(*edges[:2])
    for other in others:
        other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="lorasurgery-kernel")


# a forked child has the pool's object, but none of its threads
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
