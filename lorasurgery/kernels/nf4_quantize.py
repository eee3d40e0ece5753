"""Weights to NF4: absmax = max |w| over a block, and the nearest of 16 levels to w / absmax.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3. The code is the number of midpoints between levels that
lie below w / absmax, all in float32; bit for bit what bitsandbytes 0.50 computes on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import nf4_dequantize
from lorasurgery.kernels._chance import keys, uniform
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor
from lorasurgery.kernels.nf4_dequantize import NF4

if TYPE_CHECKING:
    from torch import Generator, Tensor

MIDDLES = (NF4[1:] + NF4[:-1]) / np.float32(2)
# and the gap above each
LEVELS = np.stack([NF4, np.append(np.diff(NF4), np.float32(0))])
TINY = 1e-38  # a smaller scale counts as this, so that its reciprocal is finite


def run(
    flat: Data, block: int, absmax: Data | None = None, seed: int | None = None, offset: int = 0
) -> tuple[Data, Data]:
    """Codes uint8 [ceil(n / 2)] and scales float32 [ceil(n / block)]; raises ShapeError.

    nan or inf among the weights shows as a scale that is not finite.

    Args:
        flat: bfloat16, float16 or float32 [n].
        block: weights that share one scale; a power of two from 2 to 4096.
        absmax: float32 scales to keep; None computes them.
        seed: None takes the nearest level, a number one of the two neighbours by chance.
        offset: index of the first weight in its tensor, so that chance is free of tiling.

    """
    if flat.ndim != 1 or dtype_name(flat.dtype) not in FLOATS:
        raise ShapeError(
            f"nf4_quantize: the weight is {dtype_name(flat.dtype)} {list(flat.shape)}, but flat "
            f"{', '.join(FLOATS)} are needed. Flatten or convert it."
        )
    nf4_dequantize.check_block(block, "nf4_quantize")
    n, blocks = flat.shape[0], -(-flat.shape[0] // block)
    if absmax is not None and (
        tuple(absmax.shape) != (blocks,) or dtype_name(absmax.dtype) != "float32"
    ):
        raise ShapeError(
            f"nf4_quantize: the scales to keep are {dtype_name(absmax.dtype)} "
            f"{list(absmax.shape)}, but {n} weights in blocks of {block} have float32 [{blocks}]. "
            "Check the block size."
        )
    form: Any = cpu
    if is_tensor(flat):
        from lorasurgery.kernels._nf4_ops import nf4_quantize as form
    result: tuple[Data, Data] = form(flat, block, absmax, seed, offset)
    return result


def reference(
    flat: Tensor, block: int, absmax: Tensor | None = None, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The definition in plain torch."""
    import torch

    wide, table = flat.float(), torch.from_numpy(NF4.copy()).to(flat.device)
    whole = len(wide) // block
    blocks, rest = wide[: whole * block].view(whole, block), wide[whole * block :]
    if absmax is None:
        short = [rest.abs().amax(keepdim=True).clamp(min=TINY)] if len(rest) else []
        absmax = torch.cat([blocks.abs().amax(dim=1), *short])
    scale = torch.where(absmax.abs() < TINY, TINY, absmax)
    x = torch.cat([(blocks * (1 / scale[:whole, None])).flatten(), rest / scale[whole:]])
    if seed is None:
        code = torch.bucketize(x, (table[:-1] + table[1:]) / 2)
    else:
        code = torch.bucketize(x, table[1:])
        u = (uniform(seed, offset, x) >> 8).float() * 2.0**-24
        gap = table[(code + 1).clamp(max=15)] - table[code]
        code = code + (u * gap < x.clamp(-1, 1) - table[code])
    pair = torch.nn.functional.pad(code, (0, len(code) % 2), value=7).view(-1, 2)
    return (pair[:, 0] << 4 | pair[:, 1]).to(torch.uint8), absmax


def cpu(
    flat: Array, block: int, absmax: Array | None = None, seed: int | None = None, offset: int = 0
) -> tuple[Array, Array]:
    """The same in numba, in one pass, spans of whole blocks over threads."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._nf4_cpu import quantize, quantize_by_chance
    from lorasurgery.kernels._threads import over_rows

    n, keep, w = len(flat), absmax is not None, source(flat)
    scales = np.empty(-(-n // block), np.float32) if absmax is None else absmax.copy()
    codes = np.empty(-(-n // 2), np.uint8)

    def part(start: int, stop: int) -> None:
        first, last = start * block, min(stop * block, n)
        here, out = scales[start:stop], codes[first // 2 : -(-last // 2)]
        if seed is None:
            quantize(w[first:last], block, MIDDLES, keep, here, out)
        else:
            chance = (*keys(seed), np.uint64(offset + first))
            quantize_by_chance(w[first:last], block, LEVELS, keep, here, out, chance)

    over_rows(part, len(scales), nf4_dequantize.LEAST // block)
    return codes, scales


def launch(
    flat: Tensor, block: int, absmax: Tensor | None = None, seed: int | None = None, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """The same in Triton, some blocks a program."""
    import torch

    from lorasurgery.kernels._nf4_triton import QUANTIZE, quantize
    from lorasurgery.kernels._tuning import Config, of_32_threads, over_blocks, tuned

    n, device, flat = len(flat), flat.device, flat.contiguous()
    codes, table = torch.empty(-(-n // 2), dtype=torch.uint8, device=device), _table(device)
    keep = absmax is not None
    scales = torch.empty(-(-n // block), device=device) if absmax is None else absmax.clone()
    k1, k2 = map(int, keys(seed or 0))

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        quantize[(-(-len(scales) // layout["ROWS"]),)](
            flat, scales, codes, table, n, len(codes), offset, k1, k2, KEEP=keep, CHANCE=seed is not None,
            **layout, enable_fp_fusion=False,
        )  # fmt: skip

    if n:
        tuned("quantize", of_32_threads(QUANTIZE), (flat, block, keep, seed is not None), start)
    return codes, scales


def _table(device: Any) -> Tensor:
    import torch

    return torch.from_numpy(NF4.copy()).to(device)


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Short last blocks, odd sizes, spans of several, zeros, denormals; each dtype and rounding."""
    import torch

    for n, block in ((1, 32), (64, 64), (333, 64), (9001, 4096), (4099, 128), (0, 64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = (0.02 * torch.randn(n, generator=rng)).to(dtype)
            w[block // 2 : block] = 0
            absmax = 0.1 * torch.rand(-(-n // block), generator=rng) - 0.01
            yield f"{n}x{block}-{dtype}", (w, block)
            yield f"{n}x{block}-{dtype}-keep", (w, block, absmax)
            yield f"{n}x{block}-{dtype}-seed", (w, block, None, 3, 77)
            yield f"{n}x{block}-{dtype}-keep-seed", (w, block, absmax, 3, (1 << 32) - 50)
    for size in (1e-45, 1e-42, 1e-39, 1e-38, 3e-38, 1e38):
        w = size * (torch.rand(161, generator=rng) - 0.5)
        w[:32] = 0
        yield f"scale-{size}", (w, 32)
        yield f"short-{size}", (w[:31], 32)
        yield f"short-zero-{size}", (w[:33].abs(), 32)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16, for a clock."""
    import torch

    w = 0.02 * torch.randn(side * side, generator=rng)
    return w.to(torch.bfloat16), 64
