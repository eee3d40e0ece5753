"""bfloat16, float16 and float32 inside numba, which knows the last alone: integers that stand for floats.

A bfloat16 travels as uint16 and a float16 as int16, so that the type of an array says how to read
it. All of it is integer arithmetic without branches, which LLVM turns into vector code.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numba import types
from numba.extending import overload

from lorasurgery.arrays import Array

_CARRIERS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float16): np.dtype(np.int16),
    np.dtype(np.float32): np.dtype(np.float32),
}
u2, u4, f4 = np.uint16, np.uint32, np.float32


def source(array: Array) -> Array:
    """An input: the same memory, C-contiguous, in the type that kernels read it by.

    Read-only, as what comes from a file is, so that numba compiles one form and not two.
    """
    view = np.ascontiguousarray(array).view(_CARRIERS.get(array.dtype, array.dtype))
    view.flags.writeable = False
    return view


def target(array: Array) -> Array:
    """An output, freshly made: the same memory in the type that kernels write it by."""
    return array.view(_CARRIERS.get(array.dtype, array.dtype))


def load(x: Any) -> Any:
    """The float32 that an element stands for; exact."""
    raise NotImplementedError


def nearest(like: Any, v: Any) -> Any:
    """A float32 as an element of the type of `like`: to the nearest, ties to even."""
    raise NotImplementedError


def by_chance(like: Any, v: Any, h: Any) -> Any:
    """A float32 rounded up or down with the odds of its distances; `h` is a uniform uint32."""
    raise NotImplementedError


@overload(load, strict=False)
def _load(x: Any) -> Any:
    if x == types.float32:
        return lambda x: x
    if x == types.uint16:
        return lambda x: u4(u4(x) << u4(16)).view(f4)
    if x == types.int16:
        return _load_half
    return None


def _load_half(x: Any) -> Any:
    h = u4(u2(x))
    magnitude = u4(u4(h & u4(0x7FFF)) << u4(13))
    # the exponent's bias differs by 112; inf and nan keep the largest exponent instead
    finite = f4(u4(magnitude).view(f4) * f4(2.0**112)).view(u4)
    bits = u4(magnitude + u4(0x70000000)) if magnitude >= u4(0x0F800000) else finite
    return u4(bits | u4(u4(h & u4(0x8000)) << u4(16))).view(f4)


@overload(nearest, strict=False)
def _nearest(like: Any, v: Any) -> Any:  # noqa: ARG001 - numba asks for the same parameters
    if like == types.float32:
        return lambda like, v: v  # noqa: ARG005
    if like == types.uint16:
        return _nearest_bfloat16
    if like == types.int16:
        return _nearest_half
    return None


def _nearest_bfloat16(like: Any, v: Any) -> Any:  # noqa: ARG001
    bits = f4(v).view(u4)
    rounded = u4(u4(bits + u4(0x7FFF) + (u4(bits >> u4(16)) & u4(1))) >> u4(16))
    return u2(rounded if v == v else u4(0x7FC0))  # noqa: PLR0124 - nan alone differs from itself


def _nearest_half(like: Any, v: Any) -> Any:  # noqa: ARG001
    bits = f4(v).view(u4)
    magnitude = u4(bits & u4(0x7FFFFFFF))
    normal = u4(magnitude - u4(112 << 23))
    rounded = u4(u4(normal + u4(0xFFF) + (u4(normal >> u4(13)) & u4(1))) >> u4(13))
    # below 2^-14 the grid has steps of 2^-24, which is the last bit of 0.5
    small = u4(f4(u4(magnitude).view(f4) + f4(0.5)).view(u4) - u4(0x3F000000))
    rounded = small if magnitude < u4(0x38800000) else rounded
    rounded = u4(0x7C00) if magnitude >= u4(0x47800000) else rounded
    rounded = u4(0x7E00) if magnitude > u4(0x7F800000) else rounded
    return np.int16(u2(rounded | u4(u4(bits >> u4(16)) & u4(0x8000))))


@overload(by_chance, strict=False)
def _by_chance(like: Any, v: Any, h: Any) -> Any:  # noqa: ARG001
    if like == types.float32:
        return lambda like, v, h: v  # noqa: ARG005
    if like == types.uint16:
        return _chance_bfloat16
    if like == types.int16:
        return _chance_half
    return None


def _chance_bfloat16(like: Any, v: Any, h: Any) -> Any:  # noqa: ARG001
    bits = f4(v).view(u4)
    rounded = u4(u4(bits + u4(h & u4(0xFFFF))) >> u4(16))
    return u2(rounded if v == v else u4(0x7FC0))  # noqa: PLR0124


def _chance_half(like: Any, v: Any, h: Any) -> Any:  # noqa: ARG001
    bits = f4(v).view(u4)
    magnitude = u4(bits & u4(0x7FFFFFFF))
    rounded = u4(u4(magnitude - u4(112 << 23) + u4(h & u4(0x1FFF))) >> u4(13))
    # below 2^-14 the grid has steps of 2^-24; the minimum keeps the conversion defined
    steps = min(u4(magnitude).view(f4), f4(2.0**-14)) * f4(2.0**24)
    whole = u4(steps)
    up = f4(u4(h >> u4(8))) * f4(2.0**-24) < f4(steps - f4(whole))
    small = u4(whole + (u4(1) if up else u4(0)))
    rounded = small if magnitude < u4(0x38800000) else rounded
    rounded = u4(0x7C00) if magnitude >= u4(0x47800000) else rounded
    rounded = u4(0x7E00) if magnitude > u4(0x7F800000) else rounded
    return np.int16(u2(rounded | u4(u4(bits >> u4(16)) & u4(0x8000))))
