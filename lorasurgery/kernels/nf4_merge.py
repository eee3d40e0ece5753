"""A merge into NF4 in one pass: codes of W + B A, with W = round(level · absmax), and what they hold of B A.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. It is
`nf4_quantize` of `lora_merge` of `nf4_dequantize`, bit for bit, without the float32 weights in memory,
and `nf4_moments` of all these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta, nf4_dequantize, nf4_moments, nf4_quantize
from lorasurgery.kernels._chance import keys
from lorasurgery.kernels._tensors import FLOATS, Data, Dtype, dtype_name, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(
    codes: Data, absmax: Data, block: int, a: Data, b: Data, dtype: Dtype,
    keep: bool = False, seed: int | None = None, offset: int = 0,
) -> tuple[Data, Data, Data]:  # fmt: skip
    """Codes, scales, and what they hold of B A, as `nf4_moments` has it; raises ShapeError.

    Args:
        codes: uint8 [ceil(n / 2)], W [rows, cols] packed, n = rows · cols.
        absmax: float32 [ceil(n / block)].
        block: weights that share one scale; a power of two from 2 to 4096.
        a: float32 [r, cols].
        b: float32 [rows, r].
        dtype: what W decodes to before it is added to.
        keep: whether the scales stay as they are.
        seed: None takes the nearest level, a number one of the two neighbours by chance.
        offset: index of W's first weight in its tensor, so that chance is free of tiling.

    """
    lora_delta.check(a, b, "nf4_merge")
    nf4_dequantize.check(b.shape[0] * a.shape[1], codes, absmax, block, "nf4_merge")
    if dtype_name(dtype) not in FLOATS:
        raise ShapeError(
            f"nf4_merge: {dtype_name(dtype)} is not one of {', '.join(FLOATS)}. Choose one of them."
        )
    form: Any = cpu
    if is_tensor(codes):
        from lorasurgery.kernels._merge_ops import nf4_merge as form
    result: tuple[Data, Data, Data] = form(codes, absmax, block, a, b, dtype, keep, seed, offset)
    return result


def reference(
    codes: Tensor, absmax: Tensor, block: int, a: Tensor, b: Tensor, dtype: Any,
    keep: bool = False, seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The kernels' definitions, one after another."""
    import torch

    table = torch.from_numpy(NF4.copy()).to(codes.device)
    d = lora_delta.reference(a, b).flatten()
    old = nf4_dequantize.reference(codes, absmax, block, len(d), dtype, table).float()
    kept = absmax if keep else None
    packed, scales = nf4_quantize.reference(old + d, block, kept, seed, offset)
    return packed, scales, nf4_moments.reference(packed, scales, block, old, d, table)


def cpu(
    codes: Array, absmax: Array, block: int, a: Array, b: Array, dtype: Any,
    keep: bool = False, seed: int | None = None, offset: int = 0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The same in numba."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._merge_nf4_cpu import merge

    packed = np.empty(len(codes), np.uint8)
    scales = absmax.copy() if keep else np.empty(len(absmax), np.float32)
    moments = np.empty((len(absmax), nf4_moments.COUNT))
    chance = None if seed is None else (*keys(seed), np.uint64(offset))
    tables = nf4_dequantize.pairs(NF4.tobytes()), nf4_quantize.MIDDLES, nf4_quantize.LEVELS
    packed_base = source(codes), source(absmax), source(np.zeros(1, dtype))
    base, out = (packed_base, None, None, block), (packed, scales, moments)
    merge(base, (source(a), source(b)), tables, keep, chance, out)
    return out


def launch(
    codes: Tensor, absmax: Tensor, block: int, a: Tensor, b: Tensor, dtype: Any,
    keep: bool = False, seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same in Triton, some blocks a program."""
    import torch

    from lorasurgery.kernels._merge_nf4_triton import merge, merge_configs
    from lorasurgery.kernels._tuning import Config, over_blocks, tuned

    n, device = b.shape[0] * a.shape[1], codes.device
    packed = torch.empty(len(codes), dtype=torch.uint8, device=device)
    scales = torch.empty(len(absmax), device=device)
    inputs = [x.contiguous() for x in (codes, absmax, a, b)]
    table, (k1, k2) = torch.from_numpy(NF4.copy()).to(device), map(int, keys(seed or 0))
    moments = torch.empty(len(absmax), nf4_moments.COUNT, dtype=torch.float64, device=device)

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        merge[(-(-len(scales) // layout["ROWS"]),)](
            *inputs, packed, scales, moments, table, n, len(codes), a.shape[1], len(a), offset,
            k1, k2, KEEP=keep, CHANCE=seed is not None, DTYPE=dtype_name(dtype),
            WHOLE=a.shape[1] % block == 0, **layout, enable_fp_fusion=False,
        )  # fmt: skip

    if n:
        configs = merge_configs(block, a.shape[1], seed is not None)
        facts = codes, block, len(a), dtype_name(dtype), keep, seed is not None
        tuned("nf4_merge", configs, facts, start)
    return packed, scales, moments


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each policy and dtype; rows that end inside of blocks and bytes, short last blocks, rank 0, no rows."""
    import torch

    sizes = (
        (5, 64, 64, 3), (33, 48, 32, 7), (3, 7, 32, 1), (20, 320, 64, 16), (2, 9, 4096, 2),
        (4, 6, 2, 0), (0, 5, 64, 2), (40, 130, 128, 13),
    )  # fmt: skip
    for rows, columns, block, rank in sizes:
        n = rows * columns
        codes = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, generator=rng)
        absmax = 0.05 * torch.rand(-(-n // block), generator=rng) + 0.01
        a = 0.1 * torch.randn(rank, columns, generator=rng)
        b = 0.01 * torch.randn(rows, rank, generator=rng)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            call, label = (codes, absmax, block, a, b, dtype), f"{rows}x{columns}-{block}-{dtype}"
            yield f"{label}-rtn", call
            yield f"{label}-keep", (*call, True)
            yield f"{label}-stochastic", (*call, False, 5, (1 << 32) - 2 * block)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer at rank 16, for a clock."""
    codes, absmax, block, _, dtype, _ = nf4_dequantize.sized(rng, side)
    return codes, absmax, block, *lora_delta.sized(rng, side), dtype
