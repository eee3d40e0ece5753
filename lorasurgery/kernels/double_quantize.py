"""NF4's scales to a second level: their mean as offset, then blocks of 256 in a dynamic 8-bit type.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; bit for bit what bitsandbytes 0.50 computes on a CPU.
(absmax - offset) / nested is put on a grid of 2^16 positions, and the position has the nearest code.

The offset is torch.mean in float32. From 32768 scales on (2 M weights in blocks of 64) torch splits that sum
over its threads, and so the last bit of the offset, and rarely a code, depend on how many there are. Here the
sum is that of two threads wherever it runs, so that a file has the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import Data, dtype_name, is_tensor
from lorasurgery.kernels.double_dequantize import TABLE

if TYPE_CHECKING:
    from torch import Generator, Tensor

BLOCK = 256
THREADS = 2


def run(absmax: Data, threads: int = THREADS) -> tuple[Data, Data, Any]:
    """q uint8 [n], nested float32 [ceil(n / 256)] and the offset; raises ShapeError.

    Args:
        absmax: float32 [n], at least one.
        threads: whose sum the offset is (see above); on a GPU it is the GPU's.

    """
    if absmax.ndim != 1 or absmax.shape[0] == 0 or dtype_name(absmax.dtype) != "float32":
        raise ShapeError(
            f"double_quantize: the scales are {dtype_name(absmax.dtype)} {list(absmax.shape)}, "
            "but float32 [n] with some n > 0 is needed. Leave out tensors without elements."
        )
    form: Any = cpu
    if is_tensor(absmax):
        from lorasurgery.kernels._nf4_ops import double_quantize as form
    result: tuple[Data, Data, Any] = form(absmax, threads)
    return result


def reference(absmax: Tensor, threads: int = THREADS) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain torch; double precision stands for a fused multiply-add."""
    import torch

    n, before = len(absmax), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        offset = absmax.mean()
    finally:
        torch.set_num_threads(before)
    rows = torch.nn.functional.pad(absmax - offset, (0, -n % BLOCK)).view(-1, BLOCK)
    nested = rows.abs().amax(dim=1)
    x = ((rows * (1 / nested[:, None])).clamp(-1, 1) + 1) * 0.5
    at = (x.double() * 65535 + 0.5).float().nan_to_num(nan=0.0).long()
    q = torch.from_numpy(positions().copy()).to(absmax.device)[at]
    q = torch.where(nested[:, None] > 0, q, 0)
    return q.flatten()[:n], nested, offset


def cpu(absmax: Array, threads: int = THREADS) -> tuple[Array, Array, np.float32]:
    """The same in numba, which sums in torch's order."""
    from lorasurgery.kernels._double_cpu import mean, quantize
    from lorasurgery.kernels._floats import source

    absmax = source(absmax)
    q, nested = np.empty(len(absmax), np.uint8), np.empty(-(-len(absmax) // BLOCK), np.float32)
    offset = mean(absmax, threads)
    quantize(absmax, offset, BLOCK, positions(), q, nested)
    return q, nested, offset


@cache
def positions() -> Array:
    """The nearest code to each of 2^16 equidistant numbers from -1 to 1: uint8 [65536]."""
    middle = (TABLE[1:] + TABLE[:-1]) / np.float32(2)
    x = np.arange(1 << 16) / 65535 * 2 - 1
    return np.searchsorted(middle, x.astype(np.float32)).astype(np.uint8)


def launch(absmax: Tensor, threads: int = THREADS) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001 - a GPU sums its own way
    """The same in Triton, around torch's own mean."""
    import torch

    from lorasurgery.kernels._double_triton import QUANTIZE, quantize
    from lorasurgery.kernels._tuning import Config, tuned

    absmax, offset = absmax.contiguous(), absmax.mean()
    q = torch.empty(len(absmax), dtype=torch.uint8, device=absmax.device)
    nested = absmax.new_empty(-(-len(absmax) // BLOCK))
    found = torch.from_numpy(positions().copy()).to(absmax.device)

    def start(config: Config) -> None:
        quantize[(len(nested),)](
            absmax, offset, found, q, nested, len(absmax), BLOCK=BLOCK, **config
        )

    tuned("double_quantize", QUANTIZE, (absmax,), start)
    return q, nested, offset


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Short blocks, one scale, equal ones, tiny ones, and more than torch sums on one thread."""
    import torch

    for n in (1, 7, 255, 256, 257, 5000):
        yield f"{n}", (torch.rand(n, generator=rng) + 0.5,)
    yield "equal", (torch.full((300,), 0.25),)
    yield "tiny", (1e-42 * torch.rand(300, generator=rng),)
    yield "threads", (torch.rand(70001, generator=rng),)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """The scales of 64 layers, for a clock."""
    import torch

    return (torch.rand(side * side, generator=rng),)
