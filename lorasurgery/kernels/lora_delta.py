"""ΔW = B A in float32, summed over the rank in order, so that its bits are the same everywhere.

Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. Scaling belongs into B; -B gives exactly -ΔW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(a: Data, b: Data) -> Data:
    """a float32 [r, cols], b float32 [rows, r] -> float32 [rows, cols]; raises ShapeError."""
    check(a, b, "lora_delta")
    form: Any = cpu
    if is_tensor(a):
        from lorasurgery.kernels._merge_ops import lora_delta as form
    result: Data = form(a, b)
    return result


def check(a: Any, b: Any, kernel: str) -> None:
    """Raises ShapeError unless the factors are float32 and of one rank."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        raise ShapeError(
            f"{kernel}: A is {list(a.shape)} and B is {list(b.shape)}, but [r, in] and [out, r] "
            "are needed. Transpose or pair them rightly."
        )
    kinds = dtype_name(a.dtype), dtype_name(b.dtype)
    if kinds != ("float32", "float32"):
        raise ShapeError(
            f"{kernel}: A is {kinds[0]} and B is {kinds[1]}, but float32 is needed. Convert them."
        )


def reference(a: Tensor, b: Tensor) -> Tensor:
    """One rank-one term after another; the sum begins at -0, which changes no term."""
    import torch

    d = torch.full((b.shape[0], a.shape[1]), -0.0, dtype=b.dtype, device=b.device)
    for k in range(a.shape[0]):
        d = d + b[:, k : k + 1] * a[k]
    return d


def cpu(a: Array, b: Array) -> Array:
    """The same in numba."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._lora_cpu import delta

    out = np.empty((b.shape[0], a.shape[1]), np.float32)
    delta(source(a), source(b), out)
    return out


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Ranks about the unrolling, columns about the chunk of 256, none, and one."""
    import torch

    for rows, columns, rank in (
        (5, 7, 1), (3, 255, 7), (4, 256, 8), (33, 257, 16), (70, 600, 19), (1, 1, 64), (6, 3, 0),
        (0, 5, 2), (5, 0, 2),
    ):  # fmt: skip
        a = torch.randn(rank, columns, generator=rng)
        b = torch.randn(rows, rank, generator=rng)
        yield f"{rows}x{columns}-rank{rank}", (a, b)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """The change of a layer at rank 16, for a clock."""
    import torch

    a, b = torch.randn(16, side, generator=rng), torch.randn(side, 16, generator=rng)
    return a, 0.001 * b
