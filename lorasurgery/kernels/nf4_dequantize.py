"""NF4 to weights: w[i] = round(table[q[i]] · absmax[i // block]).

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3 and appendix E. A byte holds two codes, the
earlier in the high half. The product is float32 and rounded once, to the nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import FLOATS, Data, Dtype, carrier, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor

# quantiles of the normal distribution, with an exact zero: appendix E
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip
NF4.flags.writeable = False

MAX_BLOCK = 4096
LEAST = 1 << 20  # weights that are worth a thread of their own: more than an operation's tile has


def run(codes: Data, absmax: Data, block: int, n: int, dtype: Dtype, table: Data) -> Data:
    """n weights in `dtype`; raises ShapeError.

    Args:
        codes: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block)].
        block: weights that share one scale; a power of two from 2 to 4096.
        n: how many weights the codes stand for.
        dtype: bfloat16, float16 or float32.
        table: float32 [16], what the codes stand for.

    """
    check(n, codes, absmax, block, "nf4_dequantize")
    check_table(table, "nf4_dequantize")
    if dtype_name(dtype) not in FLOATS:
        raise ShapeError(
            f"nf4_dequantize: {dtype_name(dtype)} is not one of {', '.join(FLOATS)}. "
            "Choose one of them."
        )
    form: Any = cpu
    if is_tensor(codes):
        from lorasurgery.kernels._nf4_ops import nf4_dequantize as form
    result: Data = form(codes, absmax, block, n, dtype, table)
    return result


def check_block(block: int, kernel: str) -> None:
    """Raises ShapeError unless kernels can take blocks of this size."""
    if not 2 <= block <= MAX_BLOCK or block & (block - 1):
        raise ShapeError(
            f"{kernel}: block size {block} is not a power of two from 2 to {MAX_BLOCK}. "
            "Check the quantization state."
        )


def check_table(table: Any, kernel: str) -> None:
    """Raises ShapeError unless it names a float32 for each code."""
    if tuple(table.shape) != (16,) or dtype_name(table.dtype) != "float32":
        raise ShapeError(
            f"{kernel}: the table is {dtype_name(table.dtype)} {list(table.shape)}, but "
            "float32 [16] is needed. Restore the file."
        )


def check(n: int, codes: Any, absmax: Any, block: int, kernel: str) -> None:
    """Raises ShapeError unless codes and scales are those of n weights."""
    check_block(block, kernel)
    got = [*codes.shape, *absmax.shape]
    if codes.ndim != 1 or absmax.ndim != 1 or got != [-(-n // 2), -(-n // block)]:
        raise ShapeError(
            f"{kernel}: {n} weights in blocks of {block} have {-(-n // 2)} bytes of codes and "
            f"{-(-n // block)} scales, but there are {list(codes.shape)} and "
            f"{list(absmax.shape)}. Check the quantization state."
        )
    kinds = dtype_name(codes.dtype), dtype_name(absmax.dtype)
    if kinds != ("uint8", "float32"):
        raise ShapeError(
            f"{kernel}: codes are {kinds[0]} and scales {kinds[1]}, but uint8 and float32 are "
            "needed. View or convert them."
        )


def reference(
    codes: Tensor, absmax: Tensor, block: int, n: int, dtype: Any, table: Tensor
) -> Tensor:
    """The formula above in plain torch."""
    import torch

    index = torch.stack((codes >> 4, codes & 15), dim=-1).flatten()[:n].long()
    return (table[index] * absmax.repeat_interleave(block)[:n]).to(dtype)


def cpu(codes: Array, absmax: Array, block: int, n: int, dtype: Any, table: Array) -> Array:
    """The same in numba, spans of whole blocks over threads."""
    from lorasurgery.kernels._floats import source, target
    from lorasurgery.kernels._nf4_cpu import dequantize
    from lorasurgery.kernels._threads import over_rows

    out = np.empty(n, dtype)
    packed, scales, both, into = source(codes), source(absmax), pairs(table.tobytes()), target(out)

    def part(start: int, stop: int) -> None:
        first, last = start * block, min(stop * block, n)
        here = packed[first // 2 : -(-last // 2)], scales[start:stop]
        dequantize(*here, block, both, into[first:last])

    over_rows(part, len(scales), LEAST // block)
    return out


@cache
def pairs(table: bytes) -> Array:
    """The two float32 that each byte of codes stands for, as one uint64 [256]."""
    values = np.frombuffer(table, np.float32)
    both = np.stack([np.repeat(values, 16), np.tile(values, 16)], axis=1)
    return np.ascontiguousarray(both).view(np.uint64).reshape(-1)


def launch(codes: Tensor, absmax: Tensor, block: int, n: int, dtype: Any, table: Tensor) -> Tensor:
    """The same in Triton: half a byte read a weight, and the result written."""
    import torch

    from lorasurgery.kernels._nf4_triton import DEQUANTIZE, DEQUANTIZE_SMALL, dequantize
    from lorasurgery.kernels._tuning import Config, of_32_threads, tuned

    out = torch.empty(n, dtype=dtype, device=codes.device)
    bfloat = dtype == torch.bfloat16
    codes, absmax, table = codes.contiguous(), absmax.contiguous(), table.contiguous()

    def start(config: Config) -> None:
        dequantize[(-(-n // config["SIZE"]),)](
            codes, absmax, table, carrier(out), n, len(codes), BLOCK=block,
            BFLOAT=bfloat, **config, enable_fp_fusion=False,
        )  # fmt: skip

    if n:
        configs = DEQUANTIZE if block >= 32 else DEQUANTIZE_SMALL
        tuned("dequantize", of_32_threads(configs), (out, block), start)
    return out


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every code; short last blocks, odd sizes, spans of several; scales from 0 to inf; each dtype."""
    import torch

    table = torch.from_numpy(NF4.copy())
    for n, block in ((1, 32), (64, 64), (333, 64), (9001, 4096), (4097, 2), (0, 64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            codes = torch.randint(0, 256, (-(-n // 2),), dtype=torch.uint8, generator=rng)
            absmax = torch.rand(-(-n // block), generator=rng)
            yield f"{n}x{block}-{dtype}", (codes, absmax, block, n, dtype, table)
    codes = torch.arange(256, dtype=torch.uint8).repeat(5)
    absmax = torch.tensor([0.0, -0.3, 3.4e38, 1e-40, 7e4]).repeat_interleave(16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield f"scales-{dtype}", (codes, absmax, 32, 2560, dtype, table.flip(0))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer to bfloat16, for a clock."""
    import torch

    n = side * side
    codes = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, generator=rng)
    absmax = torch.rand(n // 64, generator=rng)
    return codes, absmax, 64, n, torch.bfloat16, torch.from_numpy(NF4.copy())
