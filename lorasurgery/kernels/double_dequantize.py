"""NF4's scales from their second level: absmax[i] = table[q[i]] · nested[i // 256] + offset.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, §3, double quantization; the table is the signed
dynamic 8-bit type of Dettmers et al. 2022, arXiv 2110.02861, §2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import Data, dtype_name, is_tensor

if TYPE_CHECKING:
    from torch import Generator, Tensor


def _table() -> Array:
    """0, 1, and ± the middles of 2^i equal parts of [0.1, 1], times 10^(i - 6), for i = 0 to 6.

    The parts' ends are float32 as torch.linspace makes them: from both ends, each rounded once.
    """
    values: list[Array] = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    low, high = np.float32(0.1), np.float32(1)
    for i in range(7):
        parts = 1 << i
        k, step = np.arange(parts + 1), np.float64((high - low) / np.float32(parts))
        ends = np.where(k < (parts + 1) // 2, low + step * k, high - step * (parts - k))
        ends = ends.astype(np.float32)
        middles = np.float32(10.0 ** (i - 6)) * ((ends[:-1] + ends[1:]) / np.float32(2))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


TABLE = _table()
TABLE.flags.writeable = False


def run(q: Data, nested: Data, offset: Any, block: int = 256, table: Any = TABLE) -> Data:
    """float32 scales [n]; raises ShapeError.

    Args:
        q: uint8 [n].
        nested: float32 [ceil(n / block)].
        offset: what was taken off the scales, a float32.
        block: scales that share one of the second level.
        table: float32 [256], what the codes stand for.

    """
    form: Any = cpu
    if is_tensor(q):
        from lorasurgery.kernels._nf4_ops import double_dequantize as form

        offset, table = _on(q, offset), _on(q, table)
    n = q.shape[0] if q.ndim == 1 else -1
    if n < 0 or block < 1 or tuple(nested.shape) != (-(-n // block),):
        raise ShapeError(
            f"double_dequantize: codes {list(q.shape)} in blocks of {block} do not go with "
            f"{list(nested.shape)} scales. Check the quantization state."
        )
    kinds = [dtype_name(x.dtype) for x in (q, nested, table)]
    if kinds != ["uint8", "float32", "float32"] or tuple(table.shape) != (256,):
        raise ShapeError(
            f"double_dequantize: codes are {kinds[0]}, scales {kinds[1]}, the table {kinds[2]} "
            f"{list(table.shape)}, but uint8, float32 and float32 [256] are needed. "
            "Restore the file."
        )
    result: Data = form(q, nested, offset, block, table)
    return result


def reference(
    q: Tensor, nested: Tensor, offset: Any, block: int = 256, table: Any = TABLE
) -> Tensor:
    """The formula above in plain torch."""
    return _on(q, table)[q.long()] * nested.repeat_interleave(block)[: len(q)] + _on(q, offset)


def cpu(q: Array, nested: Array, offset: Any, block: int = 256, table: Array = TABLE) -> Array:
    """The same in numba."""
    from lorasurgery.kernels._double_cpu import dequantize
    from lorasurgery.kernels._floats import source

    out = np.empty(len(q), np.float32)
    dequantize(source(q), source(nested), np.float32(offset), block, source(table), out)
    return out


def launch(q: Tensor, nested: Tensor, offset: Any, block: int = 256, table: Any = TABLE) -> Tensor:
    """The same in Triton."""
    from lorasurgery.kernels._double_triton import DEQUANTIZE, dequantize
    from lorasurgery.kernels._tuning import Config, tuned

    out, q, nested = nested.new_empty(len(q)), q.contiguous(), nested.contiguous()
    levels, shift = _on(q, table), _on(q, offset)

    def start(config: Config) -> None:
        dequantize[(-(-len(q) // config["SIZE"]),)](
            q, nested, levels, shift, out, len(q), BLOCK=block, **config, enable_fp_fusion=False
        )

    if len(q):
        tuned("double_dequantize", DEQUANTIZE, (q, block), start)
    return out


def _on(q: Any, value: Any) -> Tensor:
    """An array, a number or a tensor as a float32 tensor beside q."""
    import torch

    tensor = value if is_tensor(value) else torch.as_tensor(np.array(value, np.float32))
    return tensor.to(q.device)


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Short last blocks, one scale, an own table, a negative offset."""
    import torch

    for n in (1, 255, 256, 257, 2000):
        q = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=rng)
        nested = torch.rand(-(-n // 256), generator=rng)
        yield f"{n}", (q, nested, np.float32(0.37))
    q, nested = torch.arange(256, dtype=torch.uint8), torch.rand(4, generator=rng)
    yield "own-table", (q, nested, np.float32(-0.1), 64, torch.randn(256, generator=rng))


def sized(rng: Generator, side: int) -> tuple[Any, ...]:
    """The scales of 64 layers, for a clock."""
    import torch

    n = side * side
    q = torch.randint(0, 256, (n,), dtype=torch.uint8, generator=rng)
    return q, torch.rand(-(-n // 256), generator=rng), np.float32(0.37)
