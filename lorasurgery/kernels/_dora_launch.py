"""How DoRA's kernels are laid over a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasurgery.kernels import _dora_triton as kernels
from lorasurgery.kernels._tensors import carrier
from lorasurgery.kernels._tuning import Config, tuned

if TYPE_CHECKING:
    from torch import Tensor

PROGRAMS = 512  # with fewer, rows are split, so that all of a large GPU has work

ROW_NORMS = (
    Config(ROWS=8, COLUMNS=256, num_warps=4),
    Config(ROWS=4, COLUMNS=512, num_warps=4),
    Config(ROWS=1, COLUMNS=1024, num_warps=4),
)
COLUMN_NORMS = (
    Config(ROWS=16, COLUMNS=128, num_warps=4),
    Config(ROWS=16, COLUMNS=64, num_warps=4),
    Config(ROWS=8, COLUMNS=256, num_warps=4),
)
SCALED = (
    Config(SIZE=1024, num_warps=4),
    Config(SIZE=2048, num_warps=4),
    Config(SIZE=4096, num_warps=8),
)
BACKWARD = (
    Config(ROWS=16, COLUMNS=128, num_warps=4),
    Config(ROWS=32, COLUMNS=64, num_warps=4),
    Config(ROWS=32, COLUMNS=256, num_warps=8),
)


def row_norms(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """‖W + B A‖ row by row: float32 [rows]."""
    (rows, columns), out = w.shape, a.new_empty(len(w))

    def launch(config: Config) -> None:
        kernels.row_norms[(-(-rows // config["ROWS"]),)](
            w, a, b, out, rows, columns, len(a), **config, enable_fp_fusion=False
        )

    if rows:
        tuned("row_norms", ROW_NORMS, (w, a), launch)
    return out


def column_norms(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The same column by column: float32 [cols]; sums of squares meet in float64."""
    rows, columns = w.shape
    found: list[Tensor] = []

    def launch(config: Config) -> None:
        across, steps = -(-columns // config["COLUMNS"]), -(-rows // config["ROWS"])
        span = max(1, steps * across // PROGRAMS)
        grid = across, -(-steps // span)
        partial = torch.empty(grid[1], columns, dtype=torch.float64, device=w.device)
        kernels.column_norms[grid](
            w, a, b, partial, rows, columns, len(a), span, **config, enable_fp_fusion=False
        )
        found[:] = [partial]

    if not w.numel():
        return a.new_zeros(columns)
    tuned("column_norms", COLUMN_NORMS, (w, a), launch)
    norms: Tensor = found[0].sum(dim=0).sqrt().float()
    return norms


def scaled(base: Tensor, lora: Tensor | None, scale: Tensor) -> Tensor:
    """(base + lora) · scale [n, out], rounded once."""
    # it is written flat, and may not inherit the strides of a transposed base
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)

    def launch(config: Config) -> None:
        kernels.scaled[(-(-base.numel() // config["SIZE"]),)](
            base, base if lora is None else lora, scale, carrier(out), base.numel(),
            base.shape[1], LORA=lora is not None, BFLOAT=base.dtype == torch.bfloat16, **config,
            enable_fp_fusion=False,
        )  # fmt: skip

    if base.numel():
        tuned("scaled", SCALED, (base,), launch)
    return out


def scaled_backward(
    g: Tensor, base: Tensor, lora: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """g · scale [n, out], and the sums of g · (base + lora) down the columns, float32 [out]."""
    rows, columns = base.shape
    found: list[Tensor] = []
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)

    def launch(config: Config) -> None:
        grid = -(-rows // config["ROWS"]), -(-columns // config["COLUMNS"])
        partial = torch.empty(grid[0], columns, dtype=torch.float64, device=base.device)
        kernels.scaled_backward[grid](
            g, base, base if lora is None else lora, scale, carrier(out), partial, rows, columns,
            LORA=lora is not None, BFLOAT=base.dtype == torch.bfloat16, **config,
            enable_fp_fusion=False,
        )  # fmt: skip
        found[:] = [partial]

    if not base.numel():
        return out, scale.new_zeros(columns)
    tuned("scaled_backward", BACKWARD, (base,), launch)
    return out, found[0].sum(dim=0).float()
