"""Chance without a state: a uniform 32-bit number for each (seed, index), so that tiles do not matter.

h = mix(mix(low ^ k1) + (high ^ k2)), over the two halves of the index, with keys made of the seed.
`mix` is Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(x: Any) -> Any:
    """A bijection of 32-bit numbers, held in 64-bit ones; int or int64 Tensor."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def keys(seed: int) -> tuple[np.uint32, np.uint32]:
    """What a seed (any integer, modulo 2^64) comes to."""
    first = mix(mix((seed + 0x9E3779B9) & _MASK) ^ ((seed >> 32) & _MASK))
    return np.uint32(first), np.uint32(mix((first + 0x9E3779B9) & _MASK))


def uniform(seed: int, offset: int, like: Tensor) -> Tensor:
    """The numbers of offset, offset + 1, ... for each element of `like`: int64, below 2^32."""
    import torch

    k1, k2 = map(int, keys(seed))
    index = torch.arange(offset, offset + like.numel(), device=like.device)
    low, high = index & _MASK, (index >> 32) & _MASK
    found: Tensor = mix((mix(low ^ k1) + (high ^ k2)) & _MASK)
    return found.view(like.shape)


def rounded(x: Tensor, dtype: torch.dtype, h: Tensor) -> Tensor:
    """float32 -> dtype, up or down with the odds of the distances; the definition."""
    import torch

    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32).long() & _MASK
    if dtype == torch.bfloat16:
        up = ((bits + (h & 0xFFFF)) & _MASK) >> 16
        code = torch.where(x.isnan(), 0x7FC0, up)
    else:
        size = bits & 0x7FFFFFFF
        steps = x.abs().clamp(max=2.0**-14) * 2.0**24
        up = (h >> 8).float() * 2.0**-24 < steps - steps.floor()
        small, normal = steps.floor().long() + up, (size - (112 << 23) + (h & 0x1FFF)) >> 13
        code = torch.where(size < 0x38800000, small, normal)
        code = torch.where(size >= 0x47800000, 0x7C00, code)
        code = torch.where(x.isnan(), 0x7E00, code) | (bits >> 16) & 0x8000
    return code.to(torch.uint16).view(dtype)
