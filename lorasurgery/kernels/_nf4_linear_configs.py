"""The configurations of the products with an NF4 weight, by how many rows x has.

Few rows are bound by memory, many by arithmetic. What spills on a chip is not in its list
(`make kernels` looks): a tile of 128 x 128 leaves no registers for unpacking where one warp multiplies (Ampere).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.kernels._tensors import dtype_name
from lorasurgery.kernels._tuning import Config

if TYPE_CHECKING:
    import torch


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    """BM x BN of the result, BK at a time."""
    return Config(BM=m, BN=n, BK=k, num_warps=warps, num_stages=stages)


MATVEC = (
    Config(BN=8, BK=1024, num_warps=4),
    Config(BN=4, BK=1024, num_warps=4),
    Config(BN=8, BK=2048, num_warps=8),
)
# weights that are found one by one need registers for their places
MATVEC_CROSSING = (Config(BN=8, BK=256, num_warps=4), Config(BN=4, BK=256, num_warps=4))
CROSSING_FEW = (_tile(16, 64, 32, 4, 2), _tile(16, 32, 32, 4, 2))
CROSSING = (_tile(32, 64, 32, 4, 2), _tile(32, 32, 32, 4, 2))
# Triton 3.9 multiplies float32 in tf32 on sm_100, whatever precision is asked for, where 64 rows of the first
# factor or more meet: W's in `forward`, and g's in `backward`
SINGLE_FEW = (_tile(16, 32, 128, 4, 2), _tile(16, 32, 64, 4, 2))
SINGLE = (_tile(32, 32, 128, 4, 2), _tile(32, 32, 64, 4, 2))
SINGLE_CROSSING = (_tile(16, 32, 32, 4, 2), _tile(32, 32, 32, 4, 2))
SINGLE_BACKWARD = (_tile(16, 64, 32, 4, 2), _tile(32, 64, 32, 4, 2), _tile(32, 32, 32, 4, 2))
FEW = (_tile(16, 64, 128, 4, 3), _tile(16, 64, 64, 4, 4), _tile(16, 128, 64, 8, 3))
SOME = (_tile(64, 64, 64, 4, 3), _tile(32, 64, 64, 4, 3), _tile(64, 64, 64, 4, 2))
MANY = (_tile(128, 128, 64, 8, 3), _tile(64, 128, 64, 8, 3), _tile(128, 128, 64, 8, 2))
MANY_AMPERE = (_tile(64, 128, 64, 8, 3), _tile(64, 64, 64, 4, 3), _tile(64, 128, 64, 8, 2))


def matvec(crossing: bool) -> tuple[Config, ...]:
    """For rows of x that are taken one by one."""
    return MATVEC_CROSSING if crossing else MATVEC


def tiles(m: int, dtype: torch.dtype, crossing: bool) -> tuple[Config, ...]:
    """For m rows of x at a time; `crossing`: blocks run across the ends of W's rows."""
    if dtype_name(dtype) == "float32":
        return SINGLE_CROSSING if crossing else SINGLE_FEW if m <= 16 else SINGLE
    if crossing:
        return CROSSING_FEW if m <= 16 else CROSSING
    if m <= 16:
        return FEW
    if m <= 64:
        return SOME
    return MANY if _roomy() else MANY_AMPERE


def backward(m: int, dtype: torch.dtype, crossing: bool) -> tuple[Config, ...]:
    """The same for g W; a tile of the result is BN wide, and its sums go BK rows of W at a time."""
    if dtype_name(dtype) == "float32":
        return SINGLE_CROSSING if crossing else SINGLE_BACKWARD
    return tiles(m, dtype, crossing)


def _roomy() -> bool:
    from triton import knobs
    from triton.runtime.driver import driver

    if knobs.runtime.interpret:
        return True
    target = driver.active.get_current_target()
    return bool(target.backend != "cuda" or target.arch >= 90)
