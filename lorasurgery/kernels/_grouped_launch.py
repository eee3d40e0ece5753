"""How rows of many adapters are laid over a GPU; nothing waits for it to say which adapters there are."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

from lorasurgery.kernels import _grouped_triton as kernels
from lorasurgery.kernels._tensors import dtype_name
from lorasurgery.kernels._tuning import Config, tuned

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.kernels.grouped_lora import Pages

FEW = 128  # rows that are taken one by one, as decoding has them

# BW is the most of a page that is taken at a time
SHRINK_ROWS = (
    Config(BR=16, BW=256, num_warps=4),
    Config(BR=16, BW=512, num_warps=8),
    Config(BR=16, BW=128, num_warps=2),
)
EXPAND_ROWS = (
    Config(BR=16, BW=128, num_warps=4),
    Config(BR=16, BW=256, num_warps=4),
    Config(BR=16, BW=64, num_warps=2),
)
TILES = (
    Config(BM=64, BW=64, num_warps=4),
    Config(BM=32, BW=64, num_warps=4),
    Config(BM=64, BW=128, num_warps=8),
)
# 64 rows of float32 would be multiplied in tf32 on sm_100: `_nf4_linear_configs`
TILES_SINGLE = (
    Config(BM=32, BW=64, num_warps=4),
    Config(BM=16, BW=64, num_warps=4),
    Config(BM=32, BW=128, num_warps=8),
)


def by_rows(x: Tensor, adapter: Tensor, p: Pages, base: Tensor | None) -> Tensor:
    """Decoding: each row reads its adapter's factors."""
    (m, k), n, h, out = x.shape, p.out, *_results(x, p)
    adapters, pool, (starts, scales) = len(p.scales), p.pool.contiguous(), (p.starts, p.scales)
    facts = x, p.page, p.rank, n

    def shrink(config: Config) -> None:
        kernels.shrink_rows[(m, -(-p.rank // config["BR"]))](
            x, adapter, pool, starts, scales, p.a_pages, h, adapters, k, x.stride(0), h.shape[1],
            p.a_pages.shape[1], PAGE=p.page, **_within(p.page, config),
        )  # fmt: skip

    def expand(config: Config) -> None:
        config = _within(p.page, config)
        kernels.expand_rows[(m, -(-n // config["BW"]))](
            h, adapter, pool, starts, p.b_pages, x if base is None else base.contiguous(), out,
            adapters, n, h.shape[1], p.b_pages.shape[1],
            PAGE=p.page, BASE=base is not None, **config,
        )  # fmt: skip

    if p.rank:
        tuned("shrink_rows", SHRINK_ROWS, facts, shrink)
    tuned("expand_rows", EXPAND_ROWS, facts, expand)
    return out


def by_tiles(x: Tensor, adapter: Tensor, p: Pages, base: Tensor | None) -> Tensor:
    """Prefill: rows are sorted by adapter, and those of a tile share the factors."""
    (_, k), n, h, out = x.shape, p.out, *_results(x, p)
    pool, starts, terms = p.pool.contiguous(), p.starts, 16 if p.rank <= 16 else 32
    facts = x, p.page, p.rank, n
    configs = TILES_SINGLE if dtype_name(x.dtype) == "float32" else TILES
    planned = cache(partial(plan, adapter, len(p.scales)))

    def shrink(config: Config) -> None:
        order, tiles = planned(config["BM"])
        kernels.shrink_tiles[(len(tiles), -(-p.rank // terms))](
            x, order, tiles, pool, starts, p.scales, p.a_pages, h, k, x.stride(0), h.shape[1],
            p.a_pages.shape[1], PAGE=p.page, BR=terms, **_within(p.page, config),
        )  # fmt: skip

    def expand(config: Config) -> None:
        order, tiles = planned(config["BM"])
        config = _within(p.page, config)
        kernels.expand_tiles[(len(tiles), -(-n // config["BW"]))](
            h, order, tiles, pool, starts, p.b_pages, x if base is None else base.contiguous(), out,
            n, h.shape[1], p.b_pages.shape[1],
            PAGE=p.page, BASE=base is not None, BR=terms, **config,
        )  # fmt: skip

    if p.rank:
        tuned("shrink_tiles", configs, facts, shrink)
    tuned("expand_tiles", configs, facts, expand)
    return out


def plan(adapter: Tensor, adapters: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows in the order of their adapters, int32 [m]; and tiles of `size` of them: adapter, begin, end.

    int32 [tiles, 3], as many as there may be; what is left over begins at its end.
    """
    import torch

    m, device = len(adapter), adapter.device
    group = torch.where((adapter >= 0) & (adapter < adapters), adapter.long() + 1, 0)
    group, order = torch.sort(group, stable=True)
    bounds = torch.searchsorted(group, torch.arange(adapters + 2, device=device))
    each = (bounds[1:] - bounds[:-1] + size - 1) // size
    ends = each.cumsum(0)
    tile = torch.arange(min(m, m // size + adapters + 1), device=device)
    which = torch.searchsorted(ends, tile, right=True)
    inside = which.clamp(max=adapters)
    begin = bounds[inside] + (tile - ends[inside] + each[inside]) * size
    end = torch.where(which <= adapters, bounds[inside + 1], begin)
    return order.int(), torch.stack([inside - 1, begin, end], dim=1).int()


def _within(page: int, config: Config) -> Config:
    """As much of a page as divides it, a power of two; where that is small, tiles cross pages' ends."""
    largest = page & -page
    return Config({**config, "BW": min(largest, config["BW"]) if largest >= 16 else 64})


def _results(x: Tensor, p: Pages) -> tuple[Tensor, Tensor]:
    """Room for h and for y."""
    return x.new_empty(len(x), max(1, p.rank)), x.new_empty(len(x), p.out)
