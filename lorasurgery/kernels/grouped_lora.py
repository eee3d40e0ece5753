"""Many adapters in one batch: y[i] = base[i] + h[i] · B_aᵀ, h[i] = s_a · (x[i] · A_aᵀ), a the adapter of row i.

Sheng et al. 2023 (S-LoRA), arXiv 2311.03285, §5.3; Chen et al. 2023 (Punica), arXiv 2310.18547, §4. Factors lie
in pages of one pool: a row of A, or a column of B, in as many pages as it fills. h is rounded to x's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.errors import ShapeError
from lorasurgery.kernels._tensors import FLOATS, Data, dtype_name, is_tensor
from lorasurgery.kernels.nf4_linear import wide

if TYPE_CHECKING:
    from torch import Generator, Tensor


@dataclass(frozen=True)
class Pages:
    """Where the adapters lie; as `run` takes it."""

    pool: Any
    starts: Any
    scales: Any
    a_pages: Any
    b_pages: Any
    rank: int
    out: int

    @property
    def page(self) -> int:
        """Elements of a page."""
        return int(self.pool.shape[1])


def run(
    x: Data, adapter: Data, pool: Data, starts: Data, scales: Data, a_pages: Data, b_pages: Data,
    rank: int, out: int, base: Data | None = None,
) -> Data:  # fmt: skip
    """y [m, out] in x's dtype, differentiable for x and base; raises ShapeError.

    Args:
        x: bfloat16, float16 or float32 [m, in].
        adapter: int32 [m], each row's; a number that no adapter has (-1) means none.
        pool: of x's dtype [pages, page].
        starts: int32 [adapters + 1], the ranks summed up: adapter i has rank vectors starts[i] to starts[i + 1].
        scales: float32 [adapters].
        a_pages: int32 [rank vectors, ceil(in / page)], the pages of each row of A.
        b_pages: int32 [rank vectors, ceil(out / page)], the pages of each column of B.
        rank: the largest of the adapters'.
        out: how many outputs there are.
        base: of x's dtype [m, out], what is added to; None stands for zeros.

    """
    _check(x, adapter, Pages(pool, starts, scales, a_pages, b_pages, rank, out), base)
    args = x, adapter, pool, starts, scales, a_pages, b_pages, rank, out, base
    form: Any = cpu
    if is_tensor(x):
        from lorasurgery.kernels._ops import grouped_lora as form
    y: Data = form(*args)
    return y


def _check(x: Any, adapter: Any, p: Pages, base: Any) -> None:
    given = {
        "x": x, "adapter": adapter, "pool": p.pool, "starts": p.starts, "scales": p.scales,
        "a_pages": p.a_pages, "b_pages": p.b_pages, **({} if base is None else {"base": base}),
    }  # fmt: skip
    kind = dtype_name(x.dtype)
    m, k, page = x.shape[0], x.shape[-1], p.pool.shape[-1]
    adapters, vectors = p.scales.shape[0], p.a_pages.shape[0]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": (kind if kind in FLOATS else "bfloat16", (m, k)),
        "adapter": ("int32", (m,)),
        "pool": (kind, (p.pool.shape[0], page)),
        "starts": ("int32", (adapters + 1,)),
        "scales": ("float32", (adapters,)),
        "a_pages": ("int32", (vectors, -(-k // max(1, page)))),
        "b_pages": ("int32", (vectors, -(-p.out // max(1, page)))),
        "base": (kind, (m, p.out)),
    }
    wrong = [
        f"{name} is {dtype_name(t.dtype)} {list(t.shape)}, but {wanted[name][0]} "
        f"{list(wanted[name][1])} is needed"
        for name, t in given.items()
        if (dtype_name(t.dtype), tuple(t.shape)) != wanted[name]
    ]
    if wrong:
        raise ShapeError(f"grouped_lora: {'; '.join(wrong)}. Lay the pages out for this layer.")


def reference(
    x: Tensor, adapter: Tensor, pool: Tensor, starts: Tensor, scales: Tensor, a_pages: Tensor,
    b_pages: Tensor, rank: int, out: int, base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula above in plain torch, adapter by adapter; `rank` is not needed."""
    del rank
    y = wide(x).new_zeros(len(x), out) if base is None else wide(base)
    for i, scale in enumerate(scales):
        rows = (adapter == i).nonzero()[:, 0]
        first, last = int(starts[i]), int(starts[i + 1])
        a = wide(pool[a_pages[first:last].long()].flatten(1)[:, : x.shape[1]])
        b = wide(pool[b_pages[first:last].long()].flatten(1)[:, :out])
        h = (scale * (wide(x[rows]) @ a.T)).to(x.dtype)
        y = y.index_add(0, rows, wide(h) @ b)
    return y.to(x.dtype)


def cpu(
    x: Array, adapter: Array, pool: Array, starts: Array, scales: Array, a_pages: Array,
    b_pages: Array, rank: int, out: int, base: Array | None = None,
) -> Array:  # fmt: skip
    """The same in numpy, for the adapters that rows have."""
    del rank
    shape = len(x), out
    y = np.zeros(shape, np.float32) if base is None else base.astype(np.float32)
    for i in np.unique(adapter[(adapter >= 0) & (adapter < len(scales))]):
        rows, span = np.flatnonzero(adapter == i), slice(starts[i], starts[i + 1])
        r = int(starts[i + 1] - starts[i])
        a = (
            pool[a_pages[span]]
            .reshape(r, a_pages.shape[1] * pool.shape[1])[:, : x.shape[1]]
            .astype(np.float32)
        )
        b = (
            pool[b_pages[span]]
            .reshape(r, b_pages.shape[1] * pool.shape[1])[:, :out]
            .astype(np.float32)
        )
        h = (scales[i] * (x[rows].astype(np.float32) @ a.T)).astype(x.dtype)
        y[rows] += h.astype(np.float32) @ b
    return y.astype(x.dtype)


def launch(
    x: Tensor, adapter: Tensor, pool: Tensor, starts: Tensor, scales: Tensor, a_pages: Tensor,
    b_pages: Tensor, rank: int, out: int, base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same in Triton: few rows one by one, many in tiles of those that share an adapter."""
    from lorasurgery.kernels import _grouped_launch as how

    x = x if x.stride(1) == 1 else x.contiguous()
    starts, scales = starts.contiguous(), scales.contiguous()
    pages = Pages(pool, starts, scales, a_pages.contiguous(), b_pages.contiguous(), rank, out)
    if not len(x) or not out:
        return x.new_empty(len(x), out)
    by = how.by_rows if len(x) <= how.FEW else how.by_tiles
    return by(x, adapter.contiguous(), pages, base)


def tolerance(x: Tensor, *args: Any) -> Tensor:
    """How far a sum in another order, rounded once, may lie from `reference`; h is rounded before."""
    import torch

    adapter, pool, starts, scales, a_pages, b_pages, rank, out, base = (*args, None)[:9]
    index = starts, scales.double().abs(), a_pages, b_pages, rank, out
    size = reference(x.double().abs(), adapter, pool.double().abs(), *index)
    if base is not None:
        size = size + base.double().abs()
    eps = torch.finfo(x.dtype).eps
    return size * (1e-5 + eps) if eps > 1e-5 else size * 1e-5


def cases(rng: Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Decode and prefill; odd ranks, none and unused adapters; odd pages; nan in all other memory."""
    import torch

    sizes = ((1, 40, 24, 16), (5, 96, 70, 64), (6, 130, 64, 48), (3, 21, 35, 7), (142, 40, 60, 32),
             (131, 30, 70, 10), (0, 8, 8, 8))  # fmt: skip
    for m, k, out, page in sizes:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            adapter = torch.randint(-1, 5, (m,), generator=rng, dtype=torch.int32)
            # runs of rows, as prefill has them; and an adapter that no row has
            adapter = adapter.sort().values if m % 2 else adapter.where(adapter != 3, 2)
            x = torch.randn(m, k + 1, generator=rng).to(dtype)[:, :k]
            pages = scatter((3, 0, 13, 64, 1), (k, out, page), dtype, rng)
            # with a base and without one, by turns
            if (dtype == torch.float32) == (m % 2 == 0):
                yield f"{m}x{out}x{k}-page{page}-{dtype}", (x, adapter, *pages)
                continue
            base = torch.randn(m, out, generator=rng).to(dtype)
            yield f"{m}x{out}x{k}-page{page}-{dtype}-base", (x, adapter, *pages, base)


def scatter(
    ranks: tuple[int, ...], sizes: tuple[int, int, int], dtype: Any, rng: Generator
) -> tuple[Any, ...]:
    """Random adapters for `run`, in pages at random: from `pool` to `out`; sizes are in, out and page."""
    import torch

    k, out, page = sizes
    vectors, per_a, per_b = sum(ranks), -(-k // page), -(-out // page)
    count = vectors * (per_a + per_b)
    order = torch.randperm(count + 9, generator=rng)[:count].int()
    pool = torch.full((count + 9, page), torch.nan, dtype=dtype)
    a_pages, b_pages = order[: vectors * per_a], order[vectors * per_a :]
    for index, width, per in ((a_pages, k, per_a), (b_pages, out, per_b)):
        padded = torch.full((vectors, per * page), torch.nan)
        padded[:, :width] = torch.randn(vectors, width, generator=rng) / 8
        pool[index.long()] = padded.view(-1, page).to(dtype)
    starts = torch.tensor([0, *ranks]).cumsum(0).int()
    scales = torch.rand(len(ranks), generator=rng) + 0.5
    where = a_pages.view(vectors, per_a), b_pages.view(vectors, per_b)
    return pool, starts, scales, *where, max(ranks), out
