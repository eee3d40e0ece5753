"""A merge out of NF4 in one pass: round(W + B A) with W = round(level · absmax), and what it holds of B A.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3; Hu et al. 2021 (LoRA), arXiv 2106.09685, §4.1. It is `lora_merge`
of `nf4_dequantize`, bit for bit, without the decoded weights in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import lora_delta, lora_merge, nf4_dequantize, nf4_merge
from lorasurgery.kernels._chance import keys
from lorasurgery.kernels._tensors import FLOATS, Data, Dtype, carrier, dtype_name, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor

TILE = 1 << 16  # weights that are decoded at a time: they stay in the second-level cache


def run(
    codes: Data, absmax: Data, block: int, a: Data, b: Data, decoded: Dtype, dtype: Dtype,
    seed: int | None = None, offset: int = 0,
) -> tuple[Data, float, float, float]:  # fmt: skip
    """W + B A [rows, cols] in `dtype`, signal, power and noise2 (as `lora_merge`'s); raises ShapeError.

    Args:
        codes: uint8 [ceil(n / 2)], W packed, n = rows · cols.
        absmax: float32 [ceil(n / block)].
        block: weights that share one scale; a power of two from 2 to 4096.
        a: float32 [r, cols].
        b: float32 [rows, r].
        decoded: what W decodes to before it is added to.
        dtype: of the result.
        seed: None rounds to the nearest, a number rounds up or down by chance.
        offset: index of W's first weight in its tensor, so that chance is free of tiling.

    """
    lora_delta.check(a, b, "nf4_decode_merge")
    nf4_dequantize.check(b.shape[0] * a.shape[1], codes, absmax, block, "nf4_decode_merge")
    kinds = dtype_name(decoded), dtype_name(dtype)
    if not set(kinds) <= FLOATS.keys():
        raise ShapeError(
            f"nf4_decode_merge: {' or '.join(kinds)} is not one of {', '.join(FLOATS)}. Choose one of them."
        )
    form: Any = cpu
    if is_tensor(codes):
        from lorasurgery.kernels._merge_ops import nf4_decode_merge as form
    result: tuple[Data, float, float, float] = form(
        codes, absmax, block, a, b, decoded, dtype, seed, offset
    )
    return result


def reference(
    codes: Tensor, absmax: Tensor, block: int, a: Tensor, b: Tensor, decoded: Any, dtype: Any,
    seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, float, float, float]:  # fmt: skip
    """The two kernels' definitions, one after another."""
    import torch

    n, table = b.shape[0] * a.shape[1], torch.from_numpy(NF4.copy()).to(codes.device)
    w = nf4_dequantize.reference(codes, absmax, block, n, decoded, table)
    return lora_merge.reference(w.view(b.shape[0], a.shape[1]), a, b, dtype, seed, offset)


def rows_at_a_time(columns: int, block: int) -> int:
    """About a TILE of them, that begin with a block and with a byte wherever they do."""
    least = 2 * block // gcd(2 * block, max(1, columns))
    return least * max(1, TILE // max(1, least * columns))


def cpu(
    codes: Array, absmax: Array, block: int, a: Array, b: Array, decoded: Any, dtype: Any,
    seed: int | None = None, offset: int = 0,
) -> tuple[Array, float, float, float]:  # fmt: skip
    """The same in numba, some rows at a time that are whole blocks and bytes."""
    rows, columns = len(b), a.shape[1]
    out, sums = np.empty((rows, columns), dtype), np.zeros(3)
    step = rows_at_a_time(columns, block)
    for start in range(0, rows, step):
        here = slice(start, min(start + step, rows))
        first, n = start * columns, (here.stop - start) * columns
        part = (
            codes[first // 2 : -(-(first + n) // 2)],
            absmax[first // block : -(-(first + n) // block)],
        )
        w = nf4_dequantize.cpu(*part, block, n, decoded, NF4).reshape(
            -1 if columns else len(b[here]), columns
        )
        out[here], *found = lora_merge.cpu(w, a, b[here], dtype, seed, offset + first)
        sums += found
    signal, power, noise2 = map(float, sums)
    return out, signal, power, noise2


def launch(
    codes: Tensor, absmax: Tensor, block: int, a: Tensor, b: Tensor, decoded: Any, dtype: Any,
    seed: int | None = None, offset: int = 0,
) -> tuple[Tensor, float, float, float]:  # fmt: skip
    """The same in Triton, some blocks a program; its sums meet in float64."""
    import torch

    from lorasurgery.kernels._merge_mixed_triton import decode_merge
    from lorasurgery.kernels._merge_nf4_triton import merge_configs
    from lorasurgery.kernels._tuning import Config, over_blocks, tuned

    shape, device = (b.shape[0], a.shape[1]), codes.device
    out = torch.empty(shape, dtype=dtype, device=device)
    half = dtype == torch.float16 and seed is not None
    as_bits = out.view(torch.int16) if half else carrier(out)
    inputs = [x.contiguous() for x in (codes, absmax, a, b)]
    table, (k1, k2) = torch.from_numpy(NF4.copy()).to(device), map(int, keys(seed or 0))
    sums = [torch.zeros(3, 0, dtype=torch.float64, device=device)]

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        programs = -(-len(absmax) // layout["ROWS"])
        sums[0] = torch.empty(3, programs, dtype=torch.float64, device=device)
        decode_merge[(programs,)](
            *inputs, as_bits, sums[0], table, out.numel(), len(codes), shape[1], len(a), offset, k1, k2,
            DTYPE=dtype_name(decoded), KIND=dtype_name(dtype), CHANCE=seed is not None,
            WHOLE=shape[1] % block == 0, **layout, enable_fp_fusion=False,
        )  # fmt: skip

    if out.numel():
        configs = merge_configs(block, shape[1], seed is not None)
        facts = codes, block, len(a), dtype_name(decoded), dtype_name(dtype), seed is not None
        tuned("nf4_decode_merge", configs, facts, start)
    signal, power, noise2 = sums[0].sum(dim=1).tolist()
    return out, signal, power, noise2


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Those of `nf4_merge`, to each dtype."""
    import torch

    kinds = torch.bfloat16, torch.float16, torch.float32
    for label, (codes, absmax, block, a, b, decoded, *more) in nf4_merge.cases(rng):
        if not more:
            for dtype in dict.fromkeys((decoded, torch.float32, kinds[len(b) % 3])):
                call = codes, absmax, block, a, b, decoded, dtype
                yield f"{label}-{dtype}", call
                yield f"{label}-{dtype}-seed", (*call, 5, (1 << 32) - 2 * block)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer at rank 16 to bfloat16, for a clock."""
    args = nf4_merge.sized(rng, side)
    return *args, args[-1]
