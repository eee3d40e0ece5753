"""Every kernel against its own definition, in numba and in Triton, and the laws that each must hold."""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lorasurgery import plugins
from lorasurgery.arrays import from_torch
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import (
    double_dequantize,
    double_quantize,
    lora_delta,
    lora_merge,
    nf4_dequantize,
    nf4_error,
    nf4_quantize,
)
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines: 0 / 0, 1 / denormal
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNELS = plugins.names("kernels")
LAUNCHED = ["double_dequantize", "double_quantize", "nf4_dequantize", "nf4_quantize"]
DTYPES = [np.dtype(kind) for kind in (ml_dtypes.bfloat16, np.float16, np.float32)]
# sums of float32 terms: columns of 32 in float32, the rest in float64, against float64 alone
SUMS = 2e-6
FAST = settings(max_examples=60, deadline=None)


def assert_same(got, want):
    """Equal bit for bit (tensors, arrays), or to what float32 sums are good for (floats)."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, float):
        np.testing.assert_allclose(got, want, rtol=SUMS)
    else:
        got, want = bits(got), bits(want)
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)


def bits(data):
    array = from_torch(data.cpu()) if isinstance(data, torch.Tensor) else np.asarray(data)
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)


def as_array(arg):
    if isinstance(arg, torch.dtype):
        return np.dtype(str(arg).removeprefix("torch."))
    return from_torch(arg) if isinstance(arg, torch.Tensor) else arg


def cases(name):
    kernel = plugins.load("kernels", name)
    return kernel, kernel.cases(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", KERNELS)
def test_arrays_and_tensors_give_what_the_definition_gives(name):
    kernel, inputs = cases(name)
    for label, args in inputs:
        want = kernel.reference(*args)
        got = kernel.run(*args)
        try:
            assert_same(got, want)
            assert_same(kernel.run(*map(as_array, args)), want)
        except AssertionError as error:
            raise AssertionError(f"{name} {label}: {error}") from None
        kinds = [type(x) for x in (got if isinstance(got, tuple) else (got,))]
        assert set(kinds) <= {torch.Tensor, float}


@pytest.mark.parametrize("name", LAUNCHED)
def test_triton_gives_what_the_definition_gives(name):
    kernel, inputs = cases(name)
    for label, args in inputs:
        moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
        try:
            assert_same(kernel.launch(*moved), kernel.reference(*moved))
        except AssertionError as error:
            raise AssertionError(f"{name} {label}: {error}") from None


def test_all_triton_forms_are_tried():
    assert [n for n in KERNELS if hasattr(plugins.load("kernels", n), "launch")] == LAUNCHED


def test_kernels_are_imported_without_torch_triton_and_numba():
    code = "import sys\n" + "".join(f"import lorasurgery.kernels.{name}\n" for name in KERNELS)
    code += "print(sorted({'torch', 'triton', 'numba'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "broken", ["CacheImpl._locator_classes = []", "IndexDataCacheFile.save = full"]
)
def test_a_kernel_works_where_nothing_can_be_cached(broken, tmp_path):
    code = f"""
import numba.core.caching as caching, numpy as np
def full(*args): raise OSError(28, "No space left on device")
caching.{broken}
from lorasurgery.kernels import double_dequantize
args = np.full(3, 5, np.uint8), np.ones(1, np.float32), np.float32(0.5)
print(double_dequantize.run(*args) == double_dequantize.TABLE[5] + np.float32(0.5))
"""
    command, env = [sys.executable, "-c", code], {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[ True  True  True]\n"
    assert not [*tmp_path.rglob("*.nbc")]


# --- NF4


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


# --- LoRA


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
@given(factors, st.sampled_from(DTYPES), st.sampled_from(DTYPES))
def test_merging_adds_delta_and_rounds_once(size, dtype, into):
    a, b, w = draw(*size)
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


# --- what is refused


F4, U1, BF = np.float32, np.uint8, np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: lora_delta.run(np.zeros((2, 6), F4), np.zeros((4, 3), F4)),
            "lora_delta: A is [2, 6] and B is [4, 3], but [r, in] and [out, r] are needed. "
            "Transpose or pair them rightly.",
        ),
        (
            lambda: lora_delta.run(np.zeros((2, 6), np.float16), np.zeros((4, 2), F4)),
            "lora_delta: A is float16 and B is float32, but float32 is needed. Convert them.",
        ),
        (
            lambda: lora_merge.run(np.zeros((4, 7), BF), np.zeros((2, 6), F4), np.zeros((4, 2), F4), BF),
            "lora_merge: W is [4, 7], but B A is [4, 6]. Is this adapter for another base model?",
        ),
        (
            lambda: lora_merge.run(torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(4, 2), torch.int8),
            "lora_merge: int8 is not one of bfloat16, float16, float32. Convert the weight first.",
        ),
        (
            lambda: nf4_quantize.run(np.zeros((2, 32), F4), 32),
            "nf4_quantize: the weight is float32 [2, 32], but flat bfloat16, float16, float32 are "
            "needed. Flatten or convert it.",
        ),
        (
            lambda: nf4_quantize.run(np.zeros(64, F4), 48),
            "nf4_quantize: block size 48 is not a power of two from 2 to 4096. "
            "Check the quantization state.",
        ),
        (
            lambda: nf4_quantize.run(np.zeros(65, F4), 64, np.zeros(1, F4)),
            "nf4_quantize: 65 weights in blocks of 64 have 33 bytes of codes and 2 scales, but "
            "there are [33] and [1]. Check the quantization state.",
        ),
        (
            lambda: nf4_dequantize.run(np.zeros(32, U1), np.zeros(1, np.float16), 64, 64, BF, NF4),
            "nf4_dequantize: codes are uint8 and scales float16, but uint8 and float32 are needed. "
            "View or convert them.",
        ),
        (
            lambda: nf4_dequantize.run(np.zeros(32, U1), np.zeros(1, F4), 64, 64, BF, NF4[:8]),
            "nf4_dequantize: the table is float32 [8], but float32 [16] is needed. "
            "Restore the file.",
        ),
        (
            lambda: nf4_dequantize.run(np.zeros(32, U1), np.zeros(1, F4), 64, 64, np.dtype("i4"), NF4),
            "nf4_dequantize: int32 is not one of bfloat16, float16, float32. Choose one of them.",
        ),
        (
            lambda: nf4_error.run(np.zeros(64, "f8"), np.zeros(32, U1), np.zeros(1, F4), 64),
            "nf4_error: the weight is float64 [64], but flat bfloat16, float16, float32 are "
            "needed. Flatten or convert it.",
        ),
        (
            lambda: nf4_error.run(np.zeros(64, F4), np.zeros(31, U1), np.zeros(1, F4), 64),
            "nf4_error: 64 weights in blocks of 64 have 32 bytes of codes and 1 scales, but "
            "there are [31] and [1]. Check the quantization state.",
        ),
        (
            lambda: double_quantize.run(np.zeros(0, F4)),
            "double_quantize: the scales are float32 [0], but float32 [n] with some n > 0 is "
            "needed. Leave out tensors without elements.",
        ),
        (
            lambda: double_dequantize.run(np.zeros(257, U1), np.zeros(1, F4), F4(0)),
            "double_dequantize: codes [257] in blocks of 256 do not go with [1] scales. "
            "Check the quantization state.",
        ),
        (
            lambda: double_dequantize.run(np.zeros(2, U1), np.zeros(1, F4), F4(0), 256, NF4),
            "double_dequantize: codes are uint8, scales float32, the table float32 [16], but "
            "uint8, float32 and float32 [256] are needed. Restore the file.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        call()
