"""How rows of many adapters are laid over a GPU; nothing waits for it to say which adapters there are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorasurgery.kernels import _grouped_triton as kernels

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.kernels.grouped_lora import Pages

FEW = 128  # rows that are taken one by one, as decoding has them
BM = 64  # rows of a tile


def by_rows(x: Tensor, adapter: Tensor, p: Pages, base: Tensor | None) -> Tensor:
    """Decoding: each row reads its adapter's factors."""
    (m, k), n, h, out = x.shape, p.out, *_results(x, p)
    adapters, pool, (starts, scales) = len(p.scales), p.pool.contiguous(), (p.starts, p.scales)
    wide_in, wide_out = power(p.page, 256), power(p.page, 128)
    kernels.shrink_rows[(m, -(-p.rank // 16))](
        x, adapter, pool, starts, scales, p.a_pages, h, adapters, k, x.stride(0), h.shape[1],
        p.a_pages.shape[1], PAGE=p.page, BR=16, BW=wide_in, num_warps=4,
    )  # fmt: skip
    kernels.expand_rows[(m, -(-n // wide_out))](
        h, adapter, pool, starts, p.b_pages, x if base is None else base.contiguous(), out,
        adapters, n, h.shape[1], p.b_pages.shape[1],
        PAGE=p.page, BASE=base is not None, BR=16, BW=wide_out, num_warps=4,
    )  # fmt: skip
    return out


def by_tiles(x: Tensor, adapter: Tensor, p: Pages, base: Tensor | None) -> Tensor:
    """Prefill: rows are sorted by adapter, and those of a tile share the factors."""
    (_, k), n, h, out = x.shape, p.out, *_results(x, p)
    order, tiles = plan(adapter, len(p.scales))
    pool, starts, count = p.pool.contiguous(), p.starts, len(tiles)
    wide, terms = power(p.page, 64), 16 if p.rank <= 16 else 32
    kernels.shrink_tiles[(count, -(-p.rank // terms))](
        x, order, tiles, pool, starts, p.scales, p.a_pages, h, k, x.stride(0), h.shape[1],
        p.a_pages.shape[1], PAGE=p.page, BM=BM, BR=terms, BW=wide, num_warps=4,
    )  # fmt: skip
    kernels.expand_tiles[(count, -(-n // wide))](
        h, order, tiles, pool, starts, p.b_pages, x if base is None else base.contiguous(), out,
        n, h.shape[1], p.b_pages.shape[1],
        PAGE=p.page, BASE=base is not None, BM=BM, BR=terms, BW=wide, num_warps=4,
    )  # fmt: skip
    return out


def plan(adapter: Tensor, adapters: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their adapters, int32 [m]; and tiles of them: adapter, begin, end.

    int32 [tiles, 3], as many as there may be; what is left over begins at its end.
    """
    import torch

    m, device = len(adapter), adapter.device
    group = torch.where((adapter >= 0) & (adapter < adapters), adapter.long() + 1, 0)
    group, order = torch.sort(group, stable=True)
    bounds = torch.searchsorted(group, torch.arange(adapters + 2, device=device))
    each = (bounds[1:] - bounds[:-1] + BM - 1) // BM
    ends = each.cumsum(0)
    tile = torch.arange(min(m, m // BM + adapters + 1), device=device)
    which = torch.searchsorted(ends, tile, right=True)
    inside = which.clamp(max=adapters)
    begin = bounds[inside] + (tile - ends[inside] + each[inside]) * BM
    end = torch.where(which <= adapters, bounds[inside + 1], begin)
    return order.int(), torch.stack([inside - 1, begin, end], dim=1).int()


def power(page: int, most: int) -> int:
    """The largest power of two that divides a page; where that is small, tiles cross pages' ends."""
    largest = page & -page
    return min(largest, most) if largest >= 16 else 64


def _results(x: Tensor, p: Pages) -> tuple[Tensor, Tensor]:
    """Room for h and for y."""
    return x.new_empty(len(x), max(1, p.rank)), x.new_empty(len(x), p.out)
