"""How the products with an NF4 weight are laid over a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorasurgery.kernels import _nf4_linear_triton as kernels
from lorasurgery.kernels._packed import FEW, Packed, layout, pointers, tiles

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
    if m <= FEW:
        kernels.matvec[(m, -(-n // 8))](
            *before, out, n, k, k // 2, x.stride(0), rank,
            **constants, BN=8, BK=256 if k % w.block else 1024, PART=PART, num_warps=4,
        )  # fmt: skip
        return out
    tile = tiles(m, x.dtype, k % w.block != 0)
    grid = -(-m // tile.m), -(-n // tile.n)
    # whole steps of each program, and no more programs than steps
    splits = max(1, min(PROGRAMS // (grid[0] * grid[1]), k // tile.k, 16))
    steps = -(-k // tile.k)
    span = -(-steps // splits)
    splits = -(-steps // span)
    sums = out if splits == 1 else torch.empty(splits, m, n, device=x.device)
    kernels.forward[(*grid, splits)](
        *before, sums, m, n, k, k // 2, x.stride(0), rank, span,
        **constants, **tile.blocks(),
    )  # fmt: skip
    return out if splits == 1 else sums.sum(0).to(x.dtype)


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
    tile = tiles(m, g.dtype, k % w.block != 0)
    # a tile of the result is tile.m wide, and its sums go tile.k rows of W at a time
    blocks = {**tile.blocks(), "BN": tile.k, "BK": tile.n}
    kernels.backward[(-(-m // tile.m), -(-k // tile.n))](
        g, *pointers(w), h, a, out, m, n, k, k // 2, rank,
        **layout(w, k), **_low(rank), **blocks,
    )  # fmt: skip
    return out


def _low(rank: int) -> dict[str, Any]:
    return {"LOW": rank > 0, "BR": 16 if rank <= 16 else 32}
