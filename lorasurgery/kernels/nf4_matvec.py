"""y = x · dequant(W)ᵀ for few rows of x: W stays packed in memory, and is read once.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, eq. 5, without the LoRA. Weights are rounded to x's
dtype, as if they had been dequantized before; products and sums are float32. A sum is 64 ones, interleaved, that
are then added by halves, so that its bits are the same everywhere: for a bfloat16 x in the order in which processors
multiply pairs of that dtype, and but for what is below 2^-126.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import nf4_dequantize
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

LANES = 64
_LEAST = 1 << 18  # weights that are worth a thread of their own


def run(x: Data, codes: Data, absmax: Data, block: int, rows: int, table: Data) -> Data:
    """y [m, rows] in x's dtype, rounded once; raises ShapeError.

    Args:
        x: bfloat16, float16 or float32 [m, in].
        codes: uint8 [ceil(rows · in / 2)], W [rows, in] packed.
        absmax: float32 [ceil(rows · in / block)].
        block: weights that share one scale; a power of two from 2 to 4096.
        rows: how many rows W has.
        table: float32 [16], what the codes stand for.

    """
    if x.ndim != 2 or dtype_name(x.dtype) not in FLOATS:
        raise ShapeError(
            f"nf4_matvec: x is {dtype_name(x.dtype)} {list(x.shape)}, but [m, in] of "
            f"{', '.join(FLOATS)} is needed. Reshape or convert it."
        )
    nf4_dequantize.check(rows * x.shape[1], codes, absmax, block, "nf4_matvec")
    nf4_dequantize.check_table(table, "nf4_matvec")
    form: Any = cpu
    if is_tensor(x):
        from lorasurgery.kernels._nf4_ops import nf4_matvec as form
    result: Data = form(x, codes, absmax, block, rows, table)
    return result


def reference(
    x: Tensor, codes: Tensor, absmax: Tensor, block: int, rows: int, table: Tensor
) -> Tensor:
    """The definition in plain torch: lanes of products, summed in order, then by halves."""
    import torch

    n = x.shape[1]
    w = nf4_dequantize.reference(codes, absmax, block, rows * n, x.dtype, table)
    products = x.float()[:, None, :] * w.float().view(rows, n)
    steps = _of_pairs(products) if x.dtype == torch.bfloat16 else _of_lanes(products)
    sums = torch.zeros(*products.shape[:2], LANES, device=x.device)
    for step in steps:
        sums = sums + step
    while sums.shape[-1] > 1:
        left, right = sums.chunk(2, dim=-1)
        sums = left + right
    return sums.squeeze(-1).to(x.dtype)


def _of_lanes(products: Tensor) -> Iterable[Tensor]:
    """What is added one after the other: 64 neighbours."""
    from torch.nn.functional import pad

    lanes = pad(products, (0, -products.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    yield from lanes.unbind(dim=2)


def _of_pairs(products: Tensor) -> Iterable[Tensor]:
    """Of 128 neighbours in fours the third and fourth, and then the first and second: even ones, odd ones."""
    from torch.nn.functional import pad

    whole = pad(products, (0, -products.shape[-1] % (2 * LANES)))
    fours = whole.unflatten(
        -1, (-1, 2, 16, 2, 2)
    )  # steps, their parity, lanes, the place of two, odd
    for step in fours.unbind(dim=2):
        for place in (1, 0):
            yield step[..., place, :].transpose(-1, -2).flatten(2)


def cpu(x: Array, codes: Array, absmax: Array, block: int, rows: int, table: Array) -> Array:
    """The same in numba."""
    return sums(x, codes, absmax, block, rows, table).astype(x.dtype, copy=False)


def sums(x: Array, codes: Array, absmax: Array, block: int, rows: int, table: Array) -> Array:
    """What is rounded in the end, float32 [m, rows]; rows of W over threads."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._matvec_cpu import matvec
    from lorasurgery.kernels._matvec_pairs_cpu import matvec_pairs
    from lorasurgery.kernels._threads import over_rows

    out = np.empty((len(x), rows), np.float32)
    packed = source(codes), source(absmax), block, nf4_dequantize.pairs(table.tobytes()), source(x)

    form = matvec_pairs if dtype_name(x.dtype) == "bfloat16" else matvec

    def part(start: int, stop: int) -> None:
        form(*packed, start, out[:, start:stop])

    if not x.size:
        return np.zeros((len(x), rows), np.float32)
    over_rows(part, rows, -(-_LEAST // max(1, x.size)))
    return out


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Rows that end inside of blocks and of bytes, blocks wider than rows, spans of several, none; each dtype."""
    import torch

    table = torch.from_numpy(nf4_dequantize.NF4.copy())
    for m, rows, n, block in (
        (1, 3, 64, 64), (1, 70, 4096, 64), (3, 9, 256, 32), (2, 5, 96, 64), (1, 7, 33, 32), (4, 3, 20, 4096),
        (1, 1, 1, 2), (2, 6, 2, 2), (16, 5, 192, 64), (0, 4, 64, 64), (2, 0, 64, 64), (2, 3, 0, 64),
    ):  # fmt: skip
        codes = torch.randint(0, 256, (-(-rows * n // 2),), dtype=torch.uint8, generator=rng)
        absmax = torch.rand(-(-rows * n // block), generator=rng)
        x = torch.randn(m, n, generator=rng)
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            label = f"{m}x{n}-{rows}-block{block}-{kind}"
            yield label, (x.to(kind), codes, absmax, block, rows, table)
    # two threads' worth
    codes = torch.randint(0, 256, (300 * 1024,), dtype=torch.uint8, generator=rng)
    x, absmax = torch.randn(2, 2048, generator=rng), torch.rand(9600, generator=rng)
    yield "threads", (x, codes, absmax, 64, 300, table.flip(0))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """One row of float32 against a layer, for a clock."""
    import torch

    codes, absmax, block, _, _, table = nf4_dequantize.sized(rng, side)
    return torch.randn(1, side, generator=rng), codes, absmax, block, side, table
