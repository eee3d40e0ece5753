"""The nearest level by a look-up of cells, against a search among all bounds."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from lorasurgery.kernels._nf4_count import CELLS, cells, count_below
from lorasurgery.kernels.nf4_quantize import LEVELS, MIDDLES

F4 = np.float32
BOUNDS = {"middles": MIDDLES, "levels": np.ascontiguousarray(LEVELS[0][1:])}


@numba.njit
def counted(x, bounds, nibbles):
    count_below(x, bounds, cells(bounds), nibbles)


@numba.njit
def compared(x, bounds, nibbles):
    counts, own = cells(bounds)
    count_below(x, bounds, (counts[:0], own[:0]), nibbles)


@numba.njit
def laid(bounds):
    return cells(bounds)


def hard(bounds):
    """Bounds and the ends of cells, with their neighbours; what is no number, and no small one."""
    ends = np.arange(-CELLS, CELLS + 1, dtype=F4) / (CELLS // 2)
    odd = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, -1e-45], F4)
    exact = np.concatenate([bounds, ends])
    near = [np.nextafter(exact, F4(to)) for to in (-9, 9)]
    drawn = np.random.default_rng(0).uniform(-1.3, 1.3, 200_000).astype(F4)
    x = np.concatenate([exact, *near, odd, drawn])
    return x[: len(x) // 16 * 16]


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("form", [counted, compared])
def test_every_number_is_counted_as_a_search_counts_it(name, form):
    bounds = BOUNDS[name]
    x = hard(bounds)
    found = np.empty(len(x), np.uint8)
    form(x, bounds, found)
    want = np.searchsorted(bounds, x, side="left")
    np.testing.assert_array_equal(found, np.where(np.isnan(x), 0, want))


def test_bounds_too_near_to_each_other_or_to_a_cell_s_end_are_compared_one_by_one():
    near, at_the_end = MIDDLES.copy(), MIDDLES.copy()
    near[8] = near[7] + F4(0.001)
    at_the_end[8] = np.nextafter(F4(0.125), F4(0))
    for bounds in (near, at_the_end):
        assert [len(part) for part in laid(bounds)] == [0, 0]
        x = hard(bounds)
        found = np.empty(len(x), np.uint8)
        counted(x, bounds, found)
        want = np.searchsorted(bounds, x, side="left")
        np.testing.assert_array_equal(found, np.where(np.isnan(x), 0, want))
