"""A merge of dense weights into NF4 in one pass: codes of W + B A, and what they hold of B A beside W.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. It is `nf4_quantize`
of `lora_merge`, bit for bit, without the float32 weights in memory; the noise is that of quantizing W too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta, lora_merge, nf4_dequantize, nf4_quantize
from lorasurgery.kernels._chance import keys
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor
from lorasurgery.kernels.nf4_decode_merge import rows_at_a_time
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    w: Data, block: int, a: Data, b: Data, absmax: Data | None = None, seed: int | None = None,
    offset: int = 0,
) -> tuple[Data, Data, float, float, float]:  # fmt: skip
    """Codes, scales, signal, power and noise2 (as `lora_merge`'s, in float64); raises ShapeError.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        block: weights that share one scale; a power of two from 2 to 4096.
        a: float32 [r, cols].
        b: float32 [rows, r].
        absmax: float32 scales to keep; None computes them.
        seed: None takes the nearest level, a number one of the two neighbours by chance.
        offset: index of w's first element in its tensor, so that chance is free of tiling.

    """
    lora_delta.check(a, b, "nf4_encode_merge")
    nf4_dequantize.check_block(block, "nf4_encode_merge")
    wanted, kind = (b.shape[0], a.shape[1]), dtype_name(w.dtype)
    if tuple(w.shape) != wanted or kind not in FLOATS:
        raise ShapeError(
            f"nf4_encode_merge: W is {kind} {list(w.shape)}, but {list(wanted)} of "
            f"{', '.join(FLOATS)} is needed. Is this adapter for another base model?"
        )
    blocks = -(-wanted[0] * wanted[1] // block)
    if absmax is not None and (
        tuple(absmax.shape) != (blocks,) or dtype_name(absmax.dtype) != "float32"
    ):
        raise ShapeError(
            f"nf4_encode_merge: the scales to keep are {dtype_name(absmax.dtype)} "
            f"{list(absmax.shape)}, but float32 [{blocks}] are needed. Check the block size."
        )
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._merge_ops import nf4_encode_merge as form
    result: tuple[Data, Data, float, float, float] = form(w, block, a, b, absmax, seed, offset)
    return result


def reference(
    w: Tensor, block: int, a: Tensor, b: Tensor, absmax: Tensor | None = None,
    seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, Tensor, float, float, float]:  # fmt: skip
    """The kernels' definitions, one after another."""
    import torch

    wide, d = w.float(), lora_delta.reference(a, b)
    codes, scales = nf4_quantize.reference((wide + d).flatten(), block, absmax, seed, offset)
    table = torch.from_numpy(NF4.copy()).to(w.device)
    new = nf4_dequantize.reference(codes, scales, block, wide.numel(), torch.float32, table)
    made, d = (new.view(wide.shape) - wide).double(), d.double()
    terms = made * d, d.square(), (made - d).square()
    signal, power, noise2 = (float(term.sum()) for term in terms)
    return codes, scales, signal, power, noise2


def cpu(
    w: Array, block: int, a: Array, b: Array, absmax: Array | None = None, seed: int | None = None,
    offset: int = 0,
) -> tuple[Array, Array, float, float, float]:  # fmt: skip
    """The same in numba, some rows at a time that are whole blocks and bytes."""
    rows, columns = w.shape
    codes, scales = np.empty(-(-w.size // 2), np.uint8), np.empty(-(-w.size // block), np.float32)
    sums, wide = np.zeros(3), np.dtype(np.float32)
    step = rows_at_a_time(columns, block)
    for start in range(0, rows, step):
        here, first = slice(start, start + step), start * columns
        total, *_ = lora_merge.cpu(w[here], a, b[here], wide)
        last = first + total.size
        bytes_, blocks = slice(first // 2, -(-last // 2)), slice(first // block, -(-last // block))
        kept = None if absmax is None else absmax[blocks]
        codes[bytes_], scales[blocks] = nf4_quantize.cpu(
            total.reshape(-1), block, kept, seed, offset + first
        )
        new = nf4_dequantize.cpu(codes[bytes_], scales[blocks], block, total.size, wide, NF4)
        d = lora_delta.cpu(a, b[here]).reshape(-1).astype(np.float64)
        made = (new - w[here].astype(np.float32).reshape(-1)).astype(np.float64)
        sums += made @ d, d @ d, (made - d) @ (made - d)
    signal, power, noise2 = map(float, sums)
    return codes, scales, signal, power, noise2


def launch(
    w: Tensor, block: int, a: Tensor, b: Tensor, absmax: Tensor | None = None,
    seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, Tensor, float, float, float]:  # fmt: skip
    """The same in Triton, some blocks a program; its sums meet in float64."""
    import torch

    from lorasurgery.kernels._merge_mixed_triton import encode_merge
    from lorasurgery.kernels._merge_nf4_triton import merge_configs
    from lorasurgery.kernels._tuning import Config, over_blocks, tuned

    n, device, keep = w.numel(), w.device, absmax is not None
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // block), device=device)
    given = scales if absmax is None else absmax.contiguous()
    w, a, b = w.contiguous(), a.contiguous(), b.contiguous()
    bfloat = w.dtype == torch.bfloat16
    table, (k1, k2) = torch.from_numpy(NF4.copy()).to(device), map(int, keys(seed or 0))
    sums = [torch.zeros(3, 0, dtype=torch.float64, device=device)]

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        programs = -(-len(scales) // layout["ROWS"])
        sums[0] = torch.empty(3, programs, dtype=torch.float64, device=device)
        encode_merge[(programs,)](
            w.view(torch.int16) if bfloat else w, given, a, b, codes, scales, sums[0], table, n,
            len(codes), w.shape[1], len(a), offset, k1, k2, BFLOAT=bfloat, KEEP=keep, CHANCE=seed is not None,
            WHOLE=w.shape[1] % block == 0, **layout, enable_fp_fusion=False,
        )  # fmt: skip

    if n:
        facts = w, block, len(a), keep, seed is not None
        tuned("nf4_encode_merge", merge_configs(block, w.shape[1]), facts, start)
    signal, power, noise2 = sums[0].sum(dim=1).tolist()
    return codes, scales, signal, power, noise2


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each policy and dtype; rows that end inside of blocks and bytes, short last blocks, rank 0, no rows."""
    import torch

    sizes = (
        (5, 64, 64, 3), (33, 48, 32, 7), (3, 7, 32, 1), (20, 320, 64, 16), (2, 9, 4096, 2),
        (4, 6, 2, 0), (0, 5, 64, 2), (40, 130, 128, 13),
    )  # fmt: skip
    for rows, columns, block, rank in sizes:
        w = 0.02 * torch.randn(rows, columns, generator=rng)
        a = 0.1 * torch.randn(rank, columns, generator=rng)
        b = 0.01 * torch.randn(rows, rank, generator=rng)
        absmax = 0.05 * torch.rand(-(-rows * columns // block), generator=rng) + 0.01
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            call, label = (w.to(dtype), block, a, b), f"{rows}x{columns}-{block}-{dtype}"
            yield f"{label}-rtn", call
            yield f"{label}-keep", (*call, absmax)
            yield f"{label}-stochastic", (*call, None, 5, (1 << 32) - 2 * block)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, for a clock."""
    w, block = nf4_quantize.sized(rng, side)
    return w.view(side, side), block, *lora_delta.sized(rng, side)
