"""Moments of blocks tell what codes hold of a change under any scales, to what float64 is good for."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.errors import ShapeError
from lorasurgery.kernels import (
    lora_delta,
    nf4_dequantize,
    nf4_encode_merge,
    nf4_merge,
    nf4_moments,
    nf4_quantize,
)
from lorasurgery.kernels.nf4_dequantize import NF4

BF, F2, F4 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
FAST = settings(max_examples=60, deadline=None)
# of sums of up to 30 000 terms in float64, which cancel at most a few digits
EXACT = 1e-12

sizes = st.tuples(st.integers(1, 70), st.integers(1, 400), st.sampled_from([2, 32, 64, 512, 4096]))


def drawn(rows, columns, seed=0):
    rng = np.random.default_rng([rows, columns, seed])
    w, off = rng.standard_normal((2, rows, columns), F4) * np.float32(0.02)
    a, b = rng.standard_normal((3, columns), F4), rng.standard_normal((rows, 3), F4)
    return w, off, a, np.float32(1e-3) * b


def levels(codes, n):
    """One code at a time, the earlier of two in the high half."""
    pairs = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    return NF4[pairs[:n]].astype(np.float64)


def dense(codes, scales, block, v, d):
    """Signal, power and noise2 over weights that are all there, in float64."""
    v, d = (x.reshape(-1).astype(np.float64) for x in (v, d))
    made = levels(codes, v.size) * np.repeat(scales.astype(np.float64), block)[: v.size] - v
    return made @ d, d @ d, (made - d) @ (made - d)


def close(found, wanted):
    _, power, noise2 = wanted
    # a signal is the sum of terms of both signs, none larger than these allow
    room = np.sqrt(power * (noise2 + power))
    assert found == pytest.approx(wanted, rel=EXACT, abs=EXACT * room)


def requantized(absmax, seed):
    """What scales that are quantized to 8 bits may decode to."""
    off = np.random.default_rng(seed).uniform(-0.01, 0.01, absmax.shape)
    return (absmax * (1 + off)).astype(F4)


@FAST
@given(sizes, st.sampled_from([BF, F2, F4]), st.sampled_from([None, 5]))
def test_whatever_the_scales_decode_to_the_moments_tell_what_is_held(size, dtype, seed):
    rows, columns, block = size
    w, off, a, b = drawn(rows, columns)
    d = lora_delta.run(a, b)
    codes, absmax = nf4_quantize.run((0.02 * w).reshape(-1).astype(dtype), block)
    old = nf4_dequantize.run(codes, absmax, block, w.size, dtype, NF4)
    calls = {
        "within": (old, nf4_merge.run(codes, absmax, block, a, b, dtype, False, seed, 7)),
        "keep": (old, nf4_merge.run(codes, absmax, block, a, b, dtype, True, seed, 7)),
        "into": (w, nf4_encode_merge.run(w, block, a, b, None, seed, 7)),
        "beside": (off, nf4_encode_merge.run(w, block, a, b, None, seed, 7, off.astype(dtype))),
    }
    for name, (v, (packed, scales, moments)) in calls.items():
        seen = v.astype(dtype) if name == "beside" else v
        for decoded in (scales, requantized(scales, 3)):
            found = nf4_moments.finish(moments, scales, decoded)
            close(found, dense(packed, decoded, block, seen, d))


@FAST
@given(sizes)
def test_moments_of_arrays_are_those_of_the_merge_that_made_the_codes(size):
    rows, columns, block = size
    w, off, a, b = drawn(rows, columns)
    codes, absmax, moments = nf4_encode_merge.run(w, block, a, b, None, None, 0, off)
    d = lora_delta.run(a, b).reshape(-1)
    again = nf4_moments.run(codes, absmax, block, off.reshape(-1), d, NF4)
    np.testing.assert_array_equal(moments, again)


@FAST
@given(sizes)
def test_what_is_measured_against_changes_no_code_and_no_scale(size):
    rows, columns, block = size
    w, off, a, b = drawn(rows, columns)
    one = nf4_encode_merge.run(w, block, a, b)
    other = nf4_encode_merge.run(w, block, a, b, None, None, 0, off)
    for i in range(2):
        np.testing.assert_array_equal(one[i], other[i])
    itself = nf4_encode_merge.run(w, block, a, b, None, None, 0, w)
    np.testing.assert_array_equal(one[2], itself[2])


def test_moments_of_tiles_are_the_tiles_of_moments():
    w, off, a, b = drawn(64, 96)
    whole = nf4_encode_merge.run(w, 64, a, b, None, 5, 0, off)
    parts = [
        nf4_encode_merge.run(w[i : i + 6], 64, a, b[i : i + 6], None, 5, i * 96, off[i : i + 6])
        for i in range(0, 64, 6)
    ]
    for i in range(3):
        np.testing.assert_array_equal(np.concatenate([p[i] for p in parts]), whole[i])


def test_nothing_changed_is_nothing_held():
    moments = np.zeros((0, 6))
    assert nf4_moments.finish(moments, np.zeros(0, F4), np.zeros(0, F4)) == (0, 0, 0)


U1 = np.uint8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nf4_moments.run(np.zeros(2, U1), np.zeros(1, F4), 64, np.zeros(4, F4), np.zeros(5, F4), NF4),
            "nf4_moments: V is float32 [4] and D float32 [5], but flat bfloat16, float16, float32 and as "
            "much of float32 are needed. Flatten or convert them.",
        ),
        (
            lambda: nf4_moments.run(np.zeros(2, U1), np.zeros(1, F4), 64, np.zeros(4, F4), np.zeros(4, BF), NF4),
            "nf4_moments: V is float32 [4] and D bfloat16 [4], but flat bfloat16, float16, float32 and as "
            "much of float32 are needed. Flatten or convert them.",
        ),
        (
            lambda: nf4_moments.run(np.zeros(3, U1), np.zeros(1, F4), 64, np.zeros(4, F4), np.zeros(4, F4), NF4),
            "nf4_moments: 4 weights in blocks of 64 have 2 bytes of codes and 1 scales, but there are [3] "
            "and [1]. Check the quantization state.",
        ),
        (
            lambda: nf4_moments.run(np.zeros(2, U1), np.zeros(1, F4), 64, *np.zeros((2, 4), F4), NF4[:8]),
            "nf4_moments: the table is float32 [8], but float32 [16] is needed. Restore the file.",
        ),
        (
            lambda: nf4_encode_merge.run(
                np.zeros((4, 6), BF), 64, np.zeros((2, 6), F4), np.zeros((4, 2), F4), None, None, 0,
                np.zeros((6, 4), BF),
            ),
            "nf4_encode_merge: the base is bfloat16 [6, 4], but W is [4, 6]. Is it of another layer?",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        call()
