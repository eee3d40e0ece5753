"""Laws of NF4 and of its second level: nearest levels, tiles, chance, sums in torch's order."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lorasurgery.kernels import (
    _nf4_lookup,
    double_dequantize,
    double_quantize,
    nf4_dequantize,
    nf4_error,
    nf4_quantize,
)
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines: 0 / 0, 1 / denormal
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DTYPES = [np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32)]
# sums of float32 terms: dozens at a time in float32, the rest in float64, against float64 alone
SUMS = 2e-6
FAST = settings(max_examples=60, deadline=None)


def weights():
    """Flat weights of each dtype: of many sizes, with zeros, repeats and denormals."""
    sizes, scales = st.integers(1, 9000), st.sampled_from([1.0, 0.02, 1e-3, 6e-8, 1e-38, 1e-41])

    def build(dtype, size, scale, seed):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal(size).astype(np.float32) * np.float32(scale)
        w[rng.random(size) < 0.2] = 0
        zero = rng.integers(0, size)
        w[zero : zero + 300] = 0
        return w.astype(dtype)

    return st.builds(build, st.sampled_from(DTYPES), sizes, scales, st.integers(0, 99))


blocks = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])


def unpack(codes, n):
    return np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)[:n]


@FAST
@given(weights(), blocks)
def test_no_level_is_nearer_than_the_code_s(w, block):
    codes, absmax = nf4_quantize.run(w, block)
    assert (codes.shape, absmax.shape) == ((-(-w.size // 2),), (-(-w.size // block),))
    # a scale below 1e-38 counts as that
    scale = np.repeat(np.maximum(absmax, np.float32(1e-38)), block)[: w.size].astype(np.float64)
    distance = np.abs(w.astype(np.float64)[:, None] / scale[:, None] - NF4.astype(np.float64))
    chosen = distance[np.arange(w.size), unpack(codes, w.size)]
    # w / absmax is rounded to float32, and so are the midpoints
    assert (chosen <= distance.min(axis=1) + 2**-22).all()
    starts = np.arange(0, w.size, block)
    largest = np.maximum.reduceat(np.abs(w.astype(np.float32)), starts)
    short = np.append(starts[1:], w.size) - starts < block
    np.testing.assert_array_equal(absmax, np.where(short, np.maximum(largest, 1e-38), largest))


@FAST
@given(weights(), blocks, st.sampled_from([None, 5]), st.booleans(), st.integers(1, 5))
def test_tiles_of_whole_blocks_give_the_codes_of_the_whole(w, block, seed, keep, count):
    kept = None
    if keep:
        kept = np.linspace(0.01, 2, -(-w.size // block), dtype=np.float32)
    whole = nf4_quantize.run(w, block, kept, seed, 1000)
    step, parts = block * count, []
    for start in range(0, w.size, step):
        scales = None if kept is None else kept[start // block : start // block + count]
        tile = w[start : start + step]
        parts.append(nf4_quantize.run(tile, block, scales, seed, 1000 + start))
    np.testing.assert_array_equal(np.concatenate([codes for codes, _ in parts]), whole[0])
    np.testing.assert_array_equal(np.concatenate([scales for _, scales in parts]), whole[1])


@FAST
@given(weights(), blocks, st.sampled_from(DTYPES))
def test_quantizing_what_was_decoded_changes_nothing(w, block, dtype):
    codes, absmax = nf4_quantize.run(w, block)
    decoded = nf4_dequantize.run(codes, absmax, block, w.size, np.dtype(np.float32), NF4)
    again, _ = nf4_quantize.run(decoded, block, absmax)
    # scales below 1e-38 are no longer told apart by their levels
    clear = np.repeat(absmax, block)[: w.size] > 1e-37
    np.testing.assert_array_equal(unpack(again, w.size)[clear], unpack(codes, w.size)[clear])
    rounded = nf4_dequantize.run(codes, absmax, block, w.size, dtype, NF4)
    np.testing.assert_array_equal(rounded, decoded.astype(dtype))


@FAST
@given(arrays.arrays(np.float32, 97, elements=st.floats(-2, 2, width=32)))
def test_kept_scales_clamp_what_lies_outside(w):
    codes, absmax = nf4_quantize.run(w, 32, np.full(4, 0.5, np.float32))
    np.testing.assert_array_equal(absmax, np.full(4, 0.5, np.float32))
    code = unpack(codes, 97)
    assert (code[w >= 0.5] == 15).all()
    assert (code[w <= -0.5] == 0).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_show_in_their_block_s_scale_alone(bad, dtype):
    for place in (0, 63, 64, 100, 130):
        w = np.linspace(-1, 1, 131).astype(dtype)
        w[place] = bad
        _, absmax = nf4_quantize.run(w, 64)
        assert list(np.flatnonzero(~np.isfinite(absmax))) == [place // 64]
        assert list(nf4_quantize.launch(torch.from_numpy(w.astype(np.float32)), 64)[1].isfinite()) == [
            i != place // 64 for i in range(3)
        ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_codes_are_right_on_average(dtype):
    n = 1 << 18
    w = np.full(n, 0.3).astype(dtype)
    scales = np.ones(n // 64, np.float32)
    codes, _ = nf4_quantize.run(w, 64, scales, seed=11)
    decoded = NF4[unpack(codes, n)]
    below, above = NF4[NF4 < 0.3].max(), NF4[NF4 > 0.3].min()
    assert set(decoded) == {below, above}
    # five standard deviations of the mean of two values
    value = float(w[0])
    deviation = np.sqrt((above - value) * (value - below) / n)
    assert abs(decoded.astype(np.float64).mean() - value) < 5 * deviation
    other, _ = nf4_quantize.run(w, 64, scales, seed=12)
    # two seeds agree no more often than chance has it
    p = (value - below) / (above - below)
    same = (unpack(other, n) == unpack(codes, n)).mean()
    assert abs(same - (p * p + (1 - p) ** 2)) < 5 * 0.5 / np.sqrt(n)


def test_what_is_a_level_stays_it_by_chance_too():
    for seed in range(20):
        codes, _ = nf4_quantize.run(np.tile(NF4, 64), 64, None, seed)
        np.testing.assert_array_equal(unpack(codes, 1024), np.tile(np.arange(16), 64))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 256, 1000])
def test_codes_are_looked_up_alike_by_permutation_and_by_table(n, monkeypatch):
    codes = np.random.default_rng(n).permutation(np.arange(n) % 256).astype(np.uint8)
    pairs = nf4_dequantize.pairs(NF4.tobytes())
    want = NF4[unpack(codes, 2 * n)]
    compiled, plain = np.zeros((2, n + 1), np.uint64)
    _nf4_lookup.look_up(codes, pairs, compiled)
    monkeypatch.setattr(_nf4_lookup, "WIDE", False)
    _nf4_lookup.look_up.py_func(codes, pairs, plain)
    for got in (compiled, plain):
        np.testing.assert_array_equal(got[:n].view(np.float32), want)
        assert got[n] == 0


def test_a_processor_without_avx_512_gives_the_same_bits():
    code = """
import sys, zlib, ml_dtypes, numpy as np
from lorasurgery.kernels import _nf4_lookup, nf4_dequantize, nf4_matvec
rng = np.random.default_rng(0)
codes, x = rng.integers(0, 256, 5 * 384, np.uint8), rng.standard_normal((2, 384), np.float32)
layer = codes, rng.random(30, np.float32), 128, 10, nf4_dequantize.NF4
y = nf4_matvec.run(x, *layer).tobytes() + nf4_matvec.run(x.astype(ml_dtypes.bfloat16), *layer).tobytes()
w = nf4_dequantize.run(codes, rng.random(30, np.float32), 128, 3840, x.dtype, nf4_dequantize.NF4)
print(_nf4_lookup.WIDE, zlib.crc32(y), zlib.crc32(w.tobytes()))
"""
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    plain, here = (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True, text=True, check=True, env={**os.environ, **env},
        ).stdout.split()
        for env in (generic, {})
    )  # fmt: skip
    assert plain[0] == "False"
    assert plain[1:] == here[1:]


def test_errors_of_tiles_add_up():
    w = np.random.default_rng(0).standard_normal(70_001).astype(ml_dtypes.bfloat16)
    codes, absmax = nf4_quantize.run(w, 64)
    whole = nf4_error.run(w, codes, absmax, 64)
    parts = [
        nf4_error.run(w[s : s + 6400], codes[s // 2 :][:3200], absmax[s // 64 :][:100], 64)
        for s in range(0, w.size, 6400)
    ]
    np.testing.assert_allclose(np.sum(parts, axis=0)[:2], whole[:2], rtol=SUMS)
    assert max(part[2] for part in parts) == whole[2]


# --- the second level


def test_the_table_has_256_different_values_from_below_minus_0_99_to_1():
    table = double_dequantize.TABLE
    assert (np.diff(table) > 0).all()
    assert (table[0], table[127], table[255]) == (np.float32(-0.99296875), 0, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 8, 16])
def test_the_mean_is_torch_s_on_as_many_threads(threads):
    from lorasurgery.kernels._double_cpu import mean
    from lorasurgery.kernels._floats import source

    rng = np.random.default_rng(threads)
    sizes = [*range(1, 140), 255, 256, 257, 1023, 4097, 32767, 32768, 32769, 65536, 65537]
    sizes += [98304, 98305, 262144, 524_291, 1_000_000, *rng.integers(1, 700_000, 30)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in sizes:
            x = rng.random(n, np.float32) + np.float32(0.01)
            assert mean(source(x), threads) == torch.from_numpy(x).mean().item(), n
    finally:
        torch.set_num_threads(before)


@FAST
@given(st.integers(1, 3000), st.integers(0, 99), st.sampled_from([1.0, 1e-3, 1e-30]))
def test_scales_come_back_within_a_step_of_the_second_level(n, seed, size):
    absmax = np.random.default_rng(seed).random(n, np.float32) * np.float32(size)
    q, nested, offset = double_quantize.run(absmax)
    decoded = double_dequantize.run(q, nested, offset)
    # the widest gap between codes, at the lower end, where -1 becomes -0.993
    step = np.repeat(nested, 256)[:n] * np.float32(0.0071) + np.float32(1e-6 * size)
    assert (np.abs(decoded - absmax) <= step).all()
