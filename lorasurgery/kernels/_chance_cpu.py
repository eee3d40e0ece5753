"""The numbers of `_chance` in numba."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorasurgery.kernels._numba import inner

u4, u8 = np.uint32, np.uint64


@inner
def mix(x: Any) -> Any:
    x = u4(u4(x ^ u4(x >> u4(16))) * u4(0x7FEB352D))
    x = u4(u4(x ^ u4(x >> u4(15))) * u4(0x846CA68B))
    return u4(x ^ u4(x >> u4(16)))


@inner
def uniform(keys: Any, index: Any) -> Any:
    """The uint32 of one index, a uint64."""
    low, high = u4(index), u4(index >> u8(32))
    return mix(u4(mix(u4(low ^ keys[0])) + u4(high ^ keys[1])))
