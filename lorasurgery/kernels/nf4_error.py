"""What NF4 lost: Σ (v - w)², Σ w² and max |v - w|, with v = level · absmax in float32.

Relative error is the root of the ratio of the first two. Sums over a tensor's tiles add up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import nf4_dequantize, nf4_quantize
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor


def run(flat: Data, codes: Data, absmax: Data, block: int) -> tuple[float, float, float]:
    """error2, norm2, largest; raises ShapeError.

    Args:
        flat: bfloat16, float16 or float32 [n], what was quantized.
        codes: uint8 [ceil(n / 2)].
        absmax: float32 [ceil(n / block)], the scales as they decode.
        block: weights that share one scale; a power of two from 2 to 4096.

    """
    if flat.ndim != 1 or dtype_name(flat.dtype) not in FLOATS:
        raise ShapeError(
            f"nf4_error: the weight is {dtype_name(flat.dtype)} {list(flat.shape)}, but flat "
            f"{', '.join(FLOATS)} are needed. Flatten or convert it."
        )
    nf4_dequantize.check(flat.shape[0], codes, absmax, block, "nf4_error")
    form: Any = cpu
    if is_tensor(flat):
        from lorasurgery.kernels._nf4_ops import nf4_error as form
    result: tuple[float, float, float] = form(flat, codes, absmax, block)
    return result


def reference(
    flat: Tensor, codes: Tensor, absmax: Tensor, block: int
) -> tuple[float, float, float]:
    """The formulas above; sums in float64."""
    import torch

    table = torch.from_numpy(nf4_dequantize.NF4.copy()).to(flat.device)
    call = codes, absmax, block, len(flat), torch.float32, table
    w = flat.float()
    error = (nf4_dequantize.reference(*call) - w).abs()
    largest = float(error.max()) if len(flat) else 0.0
    return float(error.double().square().sum()), float(w.double().square().sum()), largest


def cpu(flat: Array, codes: Array, absmax: Array, block: int) -> tuple[float, float, float]:
    """The same in numba, in one pass; the sums are good to about 1e-6."""
    from lorasurgery.kernels._floats import source
    from lorasurgery.kernels._nf4_cpu import error

    pairs = nf4_dequantize.pairs(nf4_dequantize.NF4.tobytes())
    error2, norm2, largest = error(source(flat), source(codes), source(absmax), block, pairs)
    return error2, norm2, float(largest)


def launch(flat: Tensor, codes: Tensor, absmax: Tensor, block: int) -> tuple[float, float, float]:
    """The same in Triton, some blocks a program; sums in float64."""
    import torch

    from lorasurgery.kernels._nf4_triton import QUANTIZE, error
    from lorasurgery.kernels._tuning import Config, of_32_threads, over_blocks, tuned

    if not len(flat):
        return 0.0, 0.0, 0.0
    inputs, device = [x.contiguous() for x in (flat, codes, absmax)], flat.device
    table = torch.from_numpy(nf4_dequantize.NF4.copy()).to(device)
    found: list[Tensor] = []

    def start(config: Config) -> None:
        layout = over_blocks(config, block)
        programs = -(-len(absmax) // layout["ROWS"])
        sums = torch.empty(2, programs, dtype=torch.float64, device=device)
        largest = torch.empty(programs, device=device)
        error[(programs,)](
            *inputs, table, sums, largest, len(flat), len(codes), **layout, enable_fp_fusion=False,
        )  # fmt: skip
        found[:] = sums, largest

    tuned("nf4_error", of_32_threads(QUANTIZE), (flat, block), start)
    error2, norm2 = found[0].sum(dim=1).tolist()
    return error2, norm2, float(found[1].max())


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Short last blocks, odd sizes, more than one flush of the sums, each dtype."""
    import torch

    for n, block in ((1, 32), (64, 64), (333, 64), (300_001, 4096), (70_000, 64), (0, 64)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            w = (0.02 * torch.randn(n, generator=rng)).to(dtype)
            codes, absmax = nf4_quantize.reference(w, block)
            yield f"{n}x{block}-{dtype}", (w, codes, absmax, block)


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """A layer of bfloat16, for a clock."""
    import torch

    w, block = nf4_quantize.sized(rng, side)
    codes = torch.randint(0, 256, (len(w) // 2,), dtype=torch.uint8, generator=rng)
    return w, codes, torch.rand(len(w) // block, generator=rng), block
