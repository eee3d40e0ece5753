"""Laws of merging: the same bits everywhere, one rounding, chance that is fair, sums that are right."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.arrays import from_torch
from lorasurgery.kernels import (
    lora_delta,
    lora_merge,
    nf4_decode_merge,
    nf4_dequantize,
    nf4_encode_merge,
    nf4_merge,
    nf4_quantize,
)

DTYPES = [np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32)]
# each to itself, to float32 and from it
PAIRS = [(x, y) for x in DTYPES for y in DTYPES if x == y or np.float32 in (x, y)]
# sums of float32 terms: dozens at a time in float32, the rest in float64, against float64 alone
SUMS = 2e-6
FAST = settings(max_examples=60, deadline=None)


def bits(data):
    array = from_torch(data) if isinstance(data, torch.Tensor) else data
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


factors = st.tuples(st.integers(1, 70), st.integers(1, 600), st.integers(0, 40))


def draw(rows, columns, rank, seed=0):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((rank, columns), np.float32)
    b = rng.standard_normal((rows, rank), np.float32) * np.float32(0.01)
    return a, b, rng.standard_normal((rows, columns), np.float32) * np.float32(0.02)


@FAST
@given(factors)
def test_minus_b_gives_exactly_minus_delta(size):
    a, b, _ = draw(*size)
    np.testing.assert_array_equal(lora_delta.run(a, -b), -lora_delta.run(a, b))


@FAST
@given(factors)
def test_delta_is_the_sum_over_the_rank_in_order(size):
    a, b, _ = draw(*size)
    d = np.zeros((size[0], size[1]), np.float32)
    for k in range(size[2]):
        d = d + np.outer(b[:, k], a[k])  # numpy rounds each product and each sum
    np.testing.assert_array_equal(lora_delta.run(a, b), d)


@FAST
@given(factors, st.sampled_from(PAIRS))
def test_merging_adds_delta_and_rounds_once(size, kinds):
    (dtype, into), (a, b, w) = kinds, draw(*size)
    w = w.astype(dtype)
    merged, signal, power, noise2 = lora_merge.run(w, a, b, into)
    d = lora_delta.run(a, b)
    np.testing.assert_array_equal(merged, (w.astype(np.float32) + d).astype(into))
    change, d = merged.astype(np.float64) - w.astype(np.float64), d.astype(np.float64)
    np.testing.assert_allclose(power, (d * d).sum(), rtol=SUMS)
    scale = np.abs(change * d).sum()
    np.testing.assert_allclose(signal, (change * d).sum(), atol=SUMS * scale)
    # the differences that are squared are themselves rounded to float32
    np.testing.assert_allclose(noise2, np.square(change - d).sum(), atol=1e-5 * scale)


@FAST
@given(factors, st.sampled_from(DTYPES), st.sampled_from([None, 5]))
def test_rows_at_a_time_give_the_bytes_of_the_whole(size, dtype, seed):
    a, b, w = draw(*size)
    w = w.astype(dtype)
    whole = lora_merge.run(w, a, b, dtype, seed, 99)
    parts = [
        lora_merge.run(w[i : i + 13], a, b[i : i + 13], dtype, seed, 99 + i * size[1])
        for i in range(0, size[0], 13)
    ]
    np.testing.assert_array_equal(bits(np.concatenate([p[0] for p in parts])), bits(whole[0]))
    sums = np.sum([p[1:] for p in parts], axis=0)
    # another order of the sums
    np.testing.assert_allclose(sums, whole[1:], rtol=1e-5, atol=1e-6 * whole[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_zero_leaves_every_bit(dtype):
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    w = every[np.abs(every) < (65504 if dtype == np.float16 else np.inf)]
    w = w[: len(w) // 8 * 8].reshape(-1, 8).astype(dtype)
    a, b = np.zeros((0, 8), np.float32), np.zeros((len(w), 0), np.float32)
    merged, signal, power, noise2 = lora_merge.run(w, a, b, w.dtype)
    np.testing.assert_array_equal(bits(merged), bits(w))
    assert (signal, power, noise2) == (0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_float32_pattern_rounds_as_torch_rounds(dtype):
    bits32 = np.arange(0, 1 << 32, 65521, dtype=np.uint64).astype(np.uint32)
    w = bits32[: len(bits32) // 8 * 8].view(np.float32).reshape(-1, 8)
    a, b = np.zeros((0, 8), np.float32), np.zeros((len(w), 0), np.float32)
    merged, *_ = lora_merge.run(w, a, b, dtype)
    want = torch.from_numpy(w).to(getattr(torch, dtype.name))
    known = ~np.isnan(w)
    np.testing.assert_array_equal(bits(merged)[known], bits(want)[known])
    assert np.isnan(merged.astype(np.float32)[~known]).all()
    wide, *_ = lora_merge.run(from_torch(want), a, b, np.dtype(np.float32))
    np.testing.assert_array_equal(bits(wide)[known], bits(want.float())[known])


@pytest.mark.parametrize(
    ("dtype", "limit"), [*zip(DTYPES, [3.396e38, 65519.9, 3.40283e38], strict=True)]
)
def test_what_does_not_fit_becomes_inf(dtype, limit):
    w = np.array([[3.39e38, -3.39e38, 65519, 65520]], np.float32)
    a, b = np.full((1, 4), 3e36, np.float32), np.ones((1, 1), np.float32)
    a[0, 1:] = [-3e36, 0, 0]
    merged = lora_merge.run(w, a, b, dtype)[0].astype(np.float32)
    total = w.astype(np.float64) + a
    np.testing.assert_array_equal(np.isinf(merged), np.abs(total) > limit)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("value", [0.3, -0.02, 3.1e-6])
def test_stochastic_rounding_keeps_the_sum(dtype, value):
    n = 1 << 18
    w = np.zeros((n // 64, 64), dtype)
    a, b = np.full((1, 64), value, np.float32), np.ones((len(w), 1), np.float32)
    merged, signal, power, _ = lora_merge.run(w, a, b, dtype, seed=3)
    value = np.float64(np.float32(value))
    merged = merged.astype(np.float64)
    assert len(np.unique(merged)) == 2
    low, high = merged.min(), merged.max()
    deviation = np.sqrt((high - value) * (value - low) / n)
    assert abs(merged.mean() - value) < 5 * deviation
    assert abs(signal / power - 1) < 5 * deviation / abs(value)
    again = lora_merge.run(w, a, b, dtype, seed=3)[0]
    np.testing.assert_array_equal(again.astype(np.float64), merged)


def test_chance_beyond_four_billion_elements_is_another():
    a, b = np.full((1, 4096), 0.3, np.float32), np.ones((1, 1), np.float32)
    w = np.zeros((1, 4096), ml_dtypes.bfloat16)
    runs = [lora_merge.run(w, a, b, w.dtype, 1, k << 32)[0] for k in range(3)]
    differ = [(runs[0] != run).mean() for run in runs[1:]]
    assert all(0.2 < share < 0.8 for share in differ)


@pytest.mark.parametrize(("rows", "columns"), [(700, 300), (5, 7), (3, 0), (0, 5)])
@pytest.mark.parametrize("seed", [None, 5])
def test_merging_out_of_nf4_and_into_it_is_what_the_parts_are_one_after_another(
    rows, columns, seed
):
    a, b, w = draw(rows, columns, 3)
    dtype, block = np.dtype(ml_dtypes.bfloat16), 64
    codes, absmax = nf4_quantize.run(w.reshape(-1), block)
    old = nf4_dequantize.run(codes, absmax, block, w.size, dtype, nf4_dequantize.NF4)
    merged, *sums = nf4_decode_merge.run(codes, absmax, block, a, b, dtype, dtype, seed, 99)
    want, *others = lora_merge.run(old.reshape(rows, columns), a, b, dtype, seed, 99)
    np.testing.assert_array_equal(bits(merged), bits(want))
    np.testing.assert_allclose(sums, others, rtol=1e-5, atol=1e-12)
    # what is encoded again is what the merge within NF4 makes of the same weights
    again = nf4_encode_merge.run(old.reshape(rows, columns), block, a, b, None, seed, 99)
    within = nf4_merge.run(codes, absmax, block, a, b, dtype, False, seed, 99)
    np.testing.assert_array_equal(again[0], within[0])
    np.testing.assert_array_equal(again[1], within[1])
    np.testing.assert_allclose(again[2], within[2], rtol=1e-13)
