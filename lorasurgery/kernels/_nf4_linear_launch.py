"""How the products with an NF4 weight are laid over a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.kernels import _nf4_linear_configs as configs
from lorasurgery.kernels import _nf4_linear_triton as kernels
from lorasurgery.kernels._packed import FEW, Packed, layout, pointers
from lorasurgery.kernels._tuning import Config, tuned

if TYPE_CHECKING:
    from torch import Tensor

PROGRAMS = 256  # with fewer, columns of the weight are split, so that all of a large GPU has work
# what a thread sums of its own in a matvec: the weights of a 128-bit load
PART = 32

LowRank = tuple["Tensor", "Tensor"]  # h [m, r] and a factor


def forward(x: Tensor, w: Packed, bias: Tensor | None, low: LowRank | None) -> Tensor:
    """x Wᵀ + h Bᵀ + bias, with B [rows, r]; h and B in x's dtype."""
    import torch

    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), n = x.shape, w.rows
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out
    h, b = low or (x, x)
    rank = h.shape[1] if low else 0
    constants = {**layout(w, k), "BIAS": bias is not None, **_low(rank)}
    before = x, *pointers(w), x if bias is None else bias.contiguous(), h, b
    facts, crossing = (x, n, *constants.values()), k % w.block != 0
    results = [out]

    def by_rows(config: Config) -> None:
        kernels.matvec[(m, -(-n // config["BN"]))](
            *before, out, n, k, k // 2, x.stride(0), rank, **constants, PART=PART, **config
        )

    def by_tiles(config: Config) -> None:
        splits, span = _split(m, n, k, config)
        results[0] = out if splits == 1 else torch.empty(splits, m, n, device=x.device)
        kernels.forward[(-(-m // config["BM"]), -(-n // config["BN"]), splits)](
            *before, results[0], m, n, k, k // 2, x.stride(0), rank, span, **constants, **config
        )

    if m <= FEW:
        tuned("matvec", configs.matvec(crossing), facts, by_rows)
        return out
    tuned("forward", configs.tiles(m, x.dtype, crossing), facts, by_tiles)
    return out if results[0] is out else results[0].sum(0).to(x.dtype)


def _split(m: int, n: int, k: int, config: Config) -> tuple[int, int]:
    """How many programs share a tile's sums, and the steps of each: whole ones, no program without any."""
    tiles = -(-m // config["BM"]) * -(-n // config["BN"])
    splits, steps = max(1, min(PROGRAMS // tiles, k // config["BK"], 16)), -(-k // config["BK"])
    span = -(-steps // splits)
    return -(-steps // span), span


def backward(g: Tensor, k: int, w: Packed, low: LowRank | None) -> Tensor:
    """G W + h A [m, k], with A [r, k]; h and A in g's dtype."""
    import torch

    g = g.contiguous()
    m, n = g.shape
    out = torch.empty(m, k, dtype=g.dtype, device=g.device)
    if m == 0 or k == 0:
        return out
    h, a = low or (g, g)
    rank = h.shape[1] if low else 0
    constants = {**layout(w, k), **_low(rank)}

    def launch(config: Config) -> None:
        turned = {**config, "BN": config["BK"], "BK": config["BN"]}
        kernels.backward[(-(-m // config["BM"]), -(-k // config["BN"]))](
            g, *pointers(w), h, a, out, m, n, k, k // 2, rank, **constants, **turned
        )

    candidates = configs.backward(m, g.dtype, k % w.block != 0)
    tuned("backward", candidates, (g, k, *constants.values()), launch)
    return out


def _low(rank: int) -> dict[str, Any]:
    return {"LOW": rank > 0, "BR": 16 if rank <= 16 else 32}
