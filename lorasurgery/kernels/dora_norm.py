"""DoRA's norms of rows: norm[i] = ‖W[i] + (B A)[i]‖, without W + B A in memory.

Liu et al. 2024 (DoRA), arXiv 2402.09353, §4.1, eq. 5. The expansion ‖W‖² + 2⟨W, BA⟩ + ‖BA‖² has as many
products, and cancels where W and B A do; here a tile of the sum is made in the cache, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta
from lorasurgery.kernels._tensors import FLOATS, Data, dispatch, dtype_name

if TYPE_CHECKING:
    from torch import Generator, Tensor

_LEAST = 1 << 20  # multiplications that are worth a thread of their own


def run(w: Data, a: Data, b: Data) -> Data:
    """float32 [rows]; raises ShapeError.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        a: float32 [r, cols].
        b: float32 [rows, r], with the adapter's scale in it.

    """
    lora_delta.check(a, b, "dora_norm")
    if tuple(w.shape) != (b.shape[0], a.shape[1]):
        raise ShapeError(
            f"dora_norm: W is {list(w.shape)}, but B A is {[b.shape[0], a.shape[1]]}. "
            "Is this adapter for another base model?"
        )
    if dtype_name(w.dtype) not in FLOATS:
        raise ShapeError(
            f"dora_norm: {dtype_name(w.dtype)} is not one of {', '.join(FLOATS)}. "
            "Convert the weight first."
        )
    result: Data = dispatch(cpu, launch, w, a, b)
    return result


def reference(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The sum in float32, as a merge makes it; squares and their sums in float64."""
    merged = w.float() + lora_delta.reference(a, b)
    return merged.double().square().sum(dim=1).sqrt().float()


def cpu(w: Array, a: Array, b: Array) -> Array:
    """The same in numba, rows over threads."""
    from lorasurgery.kernels._dora_cpu import row_norms
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._threads import over_rows

    out = np.empty(len(w), np.float32)
    wide, left, right = source(w), source(a), source(b)

    def part(start: int, stop: int) -> None:
        row_norms(wide[start:stop], left, right[start:stop], out[start:stop])

    over_rows(part, len(w), -(-_LEAST // max(1, w.shape[1] * (len(a) + 4))))
    return out


def launch(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same in Triton."""
    from lorasurgery.kernels._dora_triton import row_norms

    rows, columns = w.shape
    out = a.new_empty(rows)
    if rows:
        row_norms[(-(-rows // 8),)](
            w.contiguous(), a.contiguous(), b.contiguous(), out, rows, columns, len(a),
            ROWS=8, COLUMNS=256, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each dtype; ranks about the unrolling, columns about the chunk; a change that all but cancels."""
    import torch

    sizes = (
        (5, 7, 1), (3, 255, 7), (9, 256, 8), (33, 257, 13), (17, 600, 64), (4, 3, 0),
        (0, 5, 2), (1, 1, 1), (3, 0, 2),
    )  # fmt: skip
    for rows, columns, rank in sizes:
        a, b = (torch.randn(s, generator=rng) for s in ((rank, columns), (rows, rank)))
        w = torch.randn(rows, columns, generator=rng)
        for kind in (torch.bfloat16, torch.float16, torch.float32):
            yield f"{rows}x{columns}-rank{rank}-{kind}", (w.to(kind), a, 0.1 * b)
    a, b = torch.randn(1, 300, generator=rng), torch.randn(6, 1, generator=rng)
    yield "cancels", (-(b @ a) * (1 + 1e-5), a, b)
    yield "huge", (torch.full((2, 70), 1e38), torch.ones(1, 70), torch.ones(2, 1))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, for a clock."""
    import torch

    w = 0.02 * torch.randn(side, side, generator=rng)
    return w.to(torch.bfloat16), *lora_delta.sized(rng, side)
