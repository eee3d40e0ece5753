"""What NF4 codes hold of an intended change D, by block, before it is known what their scales decode to.

The scales are quantized themselves, once all of them are there. With e = level · s - V - D, where s is the scale a code was
chosen by and V what the weight was, whatever s decodes to (s', say) makes (e + D + (s' - s) · level) of D: six sums over
a block, in float64, are enough for signal, power and noise2 (as `lora_merge`'s, but of products that are not rounded).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import nf4_dequantize, nf4_quantize
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

# the columns: Σ e², Σ e · D, Σ D², Σ e · level, Σ level², Σ level · D
COUNT = 6


def run(codes: Data, absmax: Data, block: int, v: Data, d: Data, table: Data) -> Data:
    """Moments float64 [ceil(n / block), 6]; raises ShapeError.

    Args:
        codes: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block)], the scales that the codes were chosen by.
        block: weights that share one scale; a power of two from 2 to 4096.
        v: bfloat16, float16 or float32 [n], the weight before the change.
        d: float32 [n], the change that was meant.
        table: float32 [16], the levels.

    """
    kinds = dtype_name(v.dtype), dtype_name(d.dtype)
    if v.ndim != 1 or v.shape != d.shape or kinds[0] not in FLOATS or kinds[1] != "float32":
        raise ShapeError(
            f"nf4_moments: V is {kinds[0]} {list(v.shape)} and D {kinds[1]} {list(d.shape)}, but flat "
            f"{', '.join(FLOATS)} and as much of float32 are needed. Flatten or convert them."
        )
    nf4_dequantize.check(v.shape[0], codes, absmax, block, "nf4_moments")
    nf4_dequantize.check_table(table, "nf4_moments")
    form: Any = cpu
    if is_tensor(codes):
        from lorasurgery.kernels._merge_ops import nf4_moments as form
    result: Data = form(codes, absmax, block, v, d, table)
    return result


def finish(moments: Array, scales: Array, decoded: Array) -> tuple[float, float, float]:
    """Signal, power and noise2 of the blocks [n, 6] whose `scales` float32 [n] became `decoded`."""
    ee, ed, dd, el, ll, ld = moments.T
    off = decoded.astype(np.float64) - scales
    signal, noise2 = ed + dd + off * ld, ee + off * (2 * el + off * ll)
    return float(signal.sum()), float(dd.sum()), float(noise2.sum())


def reference(
    codes: Tensor, absmax: Tensor, block: int, v: Tensor, d: Tensor, table: Tensor
) -> Tensor:
    """The sums above, in plain torch."""
    import torch

    n, blocks = len(v), len(absmax)
    ones = torch.ones_like(absmax)
    level = nf4_dequantize.reference(codes, ones, block, n, torch.float32, table).double()
    scale, change = absmax.double().repeat_interleave(block)[:n], d.double()
    e = level * scale - v.double() - change
    terms = e * e, e * change, change * change, e * level, level * level, level * change
    by_block = torch.nn.functional.pad(torch.stack(terms), (0, blocks * block - n))
    return by_block.view(COUNT, blocks, block).sum(dim=2).T.contiguous()


def cpu(codes: Array, absmax: Array, block: int, v: Array, d: Array, table: Array) -> Array:
    """The same in numba, in one pass."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._moments_cpu import moments

    out = np.empty((len(absmax), COUNT))
    pairs = nf4_dequantize.pairs(table.tobytes())
    moments(source(codes), source(absmax), block, source(v), source(d), pairs, out)
    return out


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Short last blocks, odd sizes, spans of several, each dtype."""
    import torch

    table = torch.from_numpy(nf4_dequantize.NF4.copy())
    for n, block in ((1, 32), (64, 64), (333, 64), (9001, 4096), (4099, 2), (0, 64)):
        w, d = 0.02 * torch.randn(n, generator=rng), 0.001 * torch.randn(n, generator=rng)
        codes, absmax = nf4_quantize.reference(w + d, block)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield f"{n}x{block}-{dtype}", (codes, absmax, block, w.to(dtype), d, table)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16, for a clock."""
    import torch

    w, block = nf4_quantize.sized(rng, side)
    codes = torch.randint(0, 256, (len(w) // 2,), dtype=torch.uint8, generator=rng)
    absmax, d = torch.rand(len(w) // block, generator=rng), torch.randn(len(w), generator=rng)
    return codes, absmax, block, w, 0.001 * d, torch.from_numpy(nf4_dequantize.NF4.copy())
