"""numba's jit as the kernels want it: without the GIL, compiled when called, cached where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache, IndexDataCacheFile

Function = Callable[..., Any]


def _stamp() -> tuple[tuple[str, int, int], ...]:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((f.name, (s := f.stat()).st_mtime_ns, s.st_size) for f in files)


class _Cache(FunctionCache):  # type: ignore[misc, unused-ignore]
    """numba's cache, stale when any file of this folder changes, and silent where it cannot write.

    numba itself looks at one file, but a kernel holds code that was inlined from others.
    """

    def __init__(self, fn: Function) -> None:
        super().__init__(fn)
        self._cache_file = IndexDataCacheFile(
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=_STAMP,
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(sig, target_context)
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(OSError):
            super().save_overload(sig, data)


_STAMP = _stamp()


def jit(fn: Function) -> Function:
    """A kernel's entry: compiled for the types it is called with, kept on disk if it may be."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(fn)
    # RuntimeError: neither the package's folder nor the user's cache can be written
    with suppress(RuntimeError):
        compiled._cache = _Cache(fn)  # noqa: SLF001 - what enable_caching does, with our cache
    return compiled  # type: ignore[no-any-return, unused-ignore]


def inner(fn: Function) -> Function:
    """A part of a kernel, compiled into it."""
    return numba.njit(nogil=True, error_model="numpy")(fn)  # type: ignore[no-any-return, unused-ignore]


def unordered(fn: Function) -> Function:
    """The same where sums may be taken in any order, as vectors want them: for those of float64 alone."""
    compiled = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})
    return compiled(fn)  # type: ignore[no-any-return, unused-ignore]
