"""How a merge into dense weights is laid over a GPU: LoRA's, and DoRA's with a gain for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lorasurgery.kernels import _merge_triton as kernels
from lorasurgery.kernels._chance import keys
from lorasurgery.kernels._tensors import carrier, dtype_name
from lorasurgery.kernels._tuning import Config, tuned
from lorasurgery.kernels.dora_merge import LANES

if TYPE_CHECKING:
    from torch import Tensor

    Chance = tuple[int | None, int]  # a seed, or None, and the index of the first element
    Merged = tuple[Tensor, float, float, float]


def merge(
    w: Tensor,
    factors: tuple[Tensor, Tensor],
    gain: Tensor | None,
    dtype: torch.dtype,
    chance: Chance,
) -> Merged:
    """gain · (w + B A) in `dtype`, a tile a program; its sums meet in float64."""
    (rows, columns), (seed, offset), (a, b) = w.shape, chance, factors
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    half = dtype == torch.float16 and seed is not None
    as_bits = out.view(torch.int16) if half else carrier(out)
    bfloat, (k1, k2) = w.dtype == torch.bfloat16, map(int, keys(seed or 0))
    sums = [torch.zeros(3, 0, dtype=torch.float64, device=w.device)]

    def start(config: Config) -> None:
        grid = -(-rows // config["ROWS"]), -(-columns // config["COLUMNS"])
        sums[0] = torch.empty(3, grid[0] * grid[1], dtype=torch.float64, device=w.device)
        kernels.merge[grid](
            carrier(w), a, b, a if gain is None else gain, as_bits,
            sums[0], rows, columns, len(a), offset, k1, k2, GAIN=gain is not None, BFLOAT=bfloat,
            KIND=dtype_name(dtype), CHANCE=seed is not None, **config, enable_fp_fusion=False,
        )  # fmt: skip

    if w.numel():
        name = "lora_merge" if gain is None else "dora_merge"
        tuned(name, kernels.MERGE, (w, a, dtype_name(dtype), seed is not None), start)
    signal, power, noise2 = sums[0].sum(dim=1).tolist()
    return out, signal, power, noise2


def gains(w: Tensor, a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """m / ‖w + B A‖ row by row, float32 [rows]; squares are added in `_dora_merge_cpu`'s order."""
    (rows, columns), out = w.shape, torch.empty(len(w), device=w.device)
    bfloat = w.dtype == torch.bfloat16

    def start(config: Config) -> None:
        kernels.gains[(-(-rows // config["ROWS"]),)](
            carrier(w), a, b, m, out, rows, columns, len(a),
            BFLOAT=bfloat, LANES=LANES, HALVINGS=LANES.bit_length() - 1, **config,
            enable_fp_fusion=False,
        )  # fmt: skip

    if rows:
        tuned("dora_gains", kernels.GAINS, (w, a), start)
    return out
