"""A merge of dense weights into NF4 in one pass: codes of W + B A, and what they hold of B A beside W.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. It is `nf4_quantize`
of `lora_merge`, bit for bit, without the float32 weights in memory, and `nf4_moments` of both; the noise is that of
quantizing W too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta, nf4_dequantize, nf4_moments, nf4_quantize
from lorasurgery.kernels._chance import keys
from lorasurgery.kernels._tensors import FLOATS, Data, carrier, dtype_name, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    w: Data, block: int, a: Data, b: Data, absmax: Data | None = None, seed: int | None = None,
    offset: int = 0, base: Data | None = None,
) -> tuple[Data, Data, Data]:  # fmt: skip
    """Codes, scales, and what they hold of B A, as `nf4_moments` has it; raises ShapeError.

    Args:
        w: bfloat16, float16 or float32 [rows, cols].
        block: weights that share one scale; a power of two from 2 to 4096.
        a: float32 [r, cols].
        b: float32 [rows, r].
        absmax: float32 scales to keep; None computes them.
        seed: None takes the nearest level, a number one of the two neighbours by chance.
        offset: index of w's first element in its tensor, so that chance is free of tiling.
        base: bfloat16, float16 or float32 [rows, cols], the weight that B A was meant for; None: w.

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
    if base is not None and (tuple(base.shape) != wanted or dtype_name(base.dtype) not in FLOATS):
        raise ShapeError(
            f"nf4_encode_merge: the base is {dtype_name(base.dtype)} {list(base.shape)}, but W is "
            f"{list(wanted)}. Is it of another layer?"
        )
    form: Any = cpu
    if is_tensor(w):
        from lorasurgery.kernels._merge_ops import nf4_encode_merge as form
    result: tuple[Data, Data, Data] = form(w, block, a, b, absmax, seed, offset, base)
    return result


def reference(
    w: Tensor, block: int, a: Tensor, b: Tensor, absmax: Tensor | None = None,
    seed: int | None = None, offset: int = 0, base: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels' definitions, one after another."""
    import torch

    d, seen = lora_delta.reference(a, b), w if base is None else base
    flat, table = (w.float() + d).flatten(), torch.from_numpy(NF4.copy()).to(w.device)
    codes, scales = nf4_quantize.reference(flat, block, absmax, seed, offset)
    moments = nf4_moments.reference(codes, scales, block, seen.flatten(), d.flatten(), table)
    return codes, scales, moments


def cpu(
    w: Array, block: int, a: Array, b: Array, absmax: Array | None = None, seed: int | None = None,
    offset: int = 0, base: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The same in numba."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._merge_nf4_cpu import merge

    keep, blocks = absmax is not None, -(-w.size // block)
    codes, moments = np.empty(-(-w.size // 2), np.uint8), np.empty((blocks, nf4_moments.COUNT))
    scales = np.empty(blocks, np.float32) if absmax is None else absmax.copy()
    chance = None if seed is None else (*keys(seed), np.uint64(offset))
    tables = nf4_dequantize.pairs(NF4.tobytes()), nf4_quantize.MIDDLES, nf4_quantize.LEVELS
    seen, out = None if base is None else source(base).reshape(-1), (codes, scales, moments)
    weights = None, source(w).reshape(-1), seen, block
    merge(weights, (source(a), source(b)), tables, keep, chance, out)
    return out


def launch(
    w: Tensor, block: int, a: Tensor, b: Tensor, absmax: Tensor | None = None,
    seed: int | None = None, offset: int = 0, base: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in Triton, some blocks a program."""
    import torch

    from lorasurgery.kernels._merge_mixed_triton import encode_merge
    from lorasurgery.kernels._merge_nf4_triton import merge_configs
    from lorasurgery.kernels._tuning import Config, over_blocks, tuned

    n, device, keep = w.numel(), w.device, absmax is not None
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // block), device=device)
    moments = torch.empty(len(scales), nf4_moments.COUNT, dtype=torch.float64, device=device)
    given = scales if absmax is None else absmax.contiguous()
    dense, seen = (carrier(t.contiguous()) for t in (w, w if base is None else base))
    a, b = a.contiguous(), b.contiguous()
    table, (k1, k2) = torch.from_numpy(NF4.copy()).to(device), map(int, keys(seed or 0))

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        encode_merge[(-(-len(scales) // layout["ROWS"]),)](
            dense, seen, given, a, b, codes, scales, moments, table, n, len(codes), w.shape[1],
            len(a), offset, k1, k2, BFLOAT=dense.dtype == torch.int16, SEEN=base is not None,
            SEEN_BFLOAT=seen.dtype == torch.int16, KEEP=keep, CHANCE=seed is not None,
            WHOLE=w.shape[1] % block == 0, **layout, enable_fp_fusion=False,
        )  # fmt: skip

    if n:
        crowded = seed is not None or torch.float32 in (dense.dtype, seen.dtype)
        configs = merge_configs(block, w.shape[1], crowded)
        facts = w, block, len(a), keep, seed is not None, str(seen.dtype), base is not None
        tuned("nf4_encode_merge", configs, facts, start)
    return codes, scales, moments


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
            base = (w + 0.001 * torch.randn(w.shape, generator=rng)).to(dtype)
            yield f"{label}-base", (*call, None, None, 0, base)
        # the original's dtype need not be the base's
        yield f"{label}-other-base", (*call, None, None, 0, base.bfloat16())


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16 at rank 16, measured against another, for a clock."""
    w, block = nf4_quantize.sized(rng, side)
    w = w.view(side, side)
    return w, block, *lora_delta.sized(rng, side), None, None, 0, w.flip(0)
