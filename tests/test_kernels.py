"""Every kernel against its own definition, in numba and in Triton; and what kernels refuse."""

import os
import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from lorasurgery import plugins
from lorasurgery.arrays import from_torch
from lorasurgery.errors import ShapeError
from lorasurgery.kernels import (
    adalora_budget,
    adalora_importance,
    dora_merge,
    dora_norm,
    dora_output,
    double_dequantize,
    double_quantize,
    lora_adamw,
    lora_delta,
    lora_merge,
    nf4_decode_merge,
    nf4_dequantize,
    nf4_encode_merge,
    nf4_error,
    nf4_matvec,
    nf4_quantize,
)
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines: 0 / 0, 1 / denormal
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EVERY = plugins.names("kernels")
# the sums of the others have no fixed order: test_kernels_matrix.py
KERNELS = [n for n in EVERY if not hasattr(plugins.load("kernels", n), "tolerance")]
LAUNCHED = [
    "adalora_budget", "adalora_importance", "dora_merge", "dora_norm", "dora_output", "double_dequantize", "double_quantize", "lora_adamw",
    "lora_merge", "nf4_decode_merge", "nf4_dequantize", "nf4_encode_merge", "nf4_error", "nf4_merge", "nf4_quantize",
]  # fmt: skip
# sums of float32 terms: dozens at a time in float32, the rest in float64, against float64 alone
SUMS = 2e-6
# sums of dozens to thousands of float64 terms that may cancel, beside the largest sum of their kind
MOMENTS = 1e-12


def assert_same(got, want):
    """Equal bit for bit (tensors, arrays), or to what sums are good for (floats, and arrays of float64)."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            assert_same(one, other)
    elif isinstance(want, float):
        np.testing.assert_allclose(got, want, rtol=SUMS)
    elif bits(want).dtype == np.uint64:
        got, want = (np.asarray(torch.as_tensor(x).cpu()) for x in (got, want))
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert (np.abs(got - want) <= MOMENTS * np.abs(want).max(axis=0, initial=0)).all()
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
    code = "import sys\n" + "".join(f"import lorasurgery.kernels.{name}\n" for name in EVERY)
    code += "print(sorted({'torch', 'triton', 'numba'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_kernel_works_where_the_disk_is_full(tmp_path):
    code = """
import numba.core.caching as caching, numpy as np
def full(*args): raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
from lorasurgery.kernels import double_dequantize
args = np.full(3, 5, np.uint8), np.ones(1, np.float32), np.float32(0.5)
print(double_dequantize.run(*args) == double_dequantize.TABLE[5] + np.float32(0.5))
"""
    command, env = [sys.executable, "-c", code], {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[ True  True  True]\n"
    assert not [*tmp_path.rglob("*.nbc")]


# --- what is refused


F4, U1, BF = np.float32, np.uint8, np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: dora_merge.run(
                np.zeros((4, 6), F4), np.zeros((2, 6), F4), np.zeros((4, 2), F4), np.ones(3, F4), F4
            ),
            "dora_merge: W is [4, 6] and m [3], but B A is [4, 6]. Is this adapter for another base "
            "model?",
        ),
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
            lambda: adalora_budget.run(*[np.zeros(4, F4)] * 3, np.zeros(3, BF), -1),
            "adalora_budget: E and scores are [[4], [4], [4], [3]] of bfloat16, float32 with a budget "
            "of -1, but four flat float32 of one size and at least 0 are needed. Convert them.",
        ),
        (
            lambda: adalora_importance.run(*[np.zeros((4, 7), F4)] * 3, np.zeros((4, 6), F4), 1),
            "adalora_importance: factor, gradient and state are [[4, 7], [4, 7], [4, 7], [4, 6]] of "
            "float32 with axis 1, but four float32 [rows, cols] of one shape and axis 0 or 1 are "
            "needed. Convert them.",
        ),
        (
            lambda: lora_adamw.run(*[np.zeros(4, F4)] * 3, np.zeros(4, BF), 1, 1, lora_adamw.Rates(1)),
            "lora_adamw: factors, gradient and moments are [[4], [4], [4], [4]] of bfloat16, float32, "
            "but four flat float32 of one size are needed. Flatten and convert them.",
        ),
        (
            lambda: lora_adamw.run(*[np.zeros(4, F4)] * 4, 5, 0, lora_adamw.Rates(1)),
            "lora_adamw: split 5 is not in 0..4, or step 0 is below 1. Count the elements of all A, "
            "and steps from 1.",
        ),
        (
            lambda: dora_norm.run(np.zeros((4, 7), BF), np.zeros((2, 6), F4), np.zeros((4, 2), F4)),
            "dora_norm: W is [4, 7], but B A is [4, 6]. Is this adapter for another base model?",
        ),
        (
            lambda: dora_norm.run(torch.zeros(4, 6).int(), torch.zeros(2, 6), torch.zeros(4, 2)),
            "dora_norm: int32 is not one of bfloat16, float16, float32. Convert the weight first.",
        ),
        (
            lambda: dora_norm.run(np.zeros((4, 6), F4), np.zeros((2, 6), F4), np.zeros((4, 2), F4), 2),
            "dora_norm: axis 2 is neither 0 nor 1. Norms of rows are along 1.",
        ),
        (
            lambda: dora_output.run(np.zeros((2, 3), F4), np.zeros((2, 3), BF), np.ones(3, F4), np.ones(3, F4)),
            "dora_output: the base's output is float32 [2, 3] and the adapter's bfloat16 [2, 3], but "
            "both must be one [n, out]. Reshape or convert them.",
        ),
        (
            lambda: dora_output.run(np.zeros((2, 3), F4), np.zeros((2, 3), F4), np.ones(2, F4), np.ones(3, F4)),
            "dora_output: magnitudes are float32 [2] and norms float32 [3], but float32 [3] is "
            "needed. Is the adapter for this layer?",
        ),
        (
            lambda: dora_output.run(np.zeros((2, 3)), np.zeros((2, 3)), np.ones(3, F4), np.ones(3, F4)),
            "dora_output: float64 is not one of bfloat16, float16, float32. Convert the outputs first.",
        ),
        (
            lambda: nf4_decode_merge.run(
                np.zeros(12, U1), np.zeros(1, F4), 64, np.zeros((2, 6), F4), np.zeros((4, 2), F4), BF, np.dtype("f8")
            ),
            "nf4_decode_merge: bfloat16 or float64 is not one of bfloat16, float16, float32. Choose one "
            "of them.",
        ),
        (
            lambda: nf4_encode_merge.run(np.zeros((4, 7), BF), 64, np.zeros((2, 6), F4), np.zeros((4, 2), F4)),
            "nf4_encode_merge: W is bfloat16 [4, 7], but [4, 6] of bfloat16, float16, float32 is needed. "
            "Is this adapter for another base model?",
        ),
        (
            lambda: nf4_encode_merge.run(
                np.zeros((4, 6), BF), 16, np.zeros((2, 6), F4), np.zeros((4, 2), F4), np.ones(1, F4)
            ),
            "nf4_encode_merge: the scales to keep are float32 [1], but float32 [2] are needed. Check the "
            "block size.",
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
            "nf4_quantize: the scales to keep are float32 [1], but 65 weights in blocks of 64 have "
            "float32 [2]. Check the block size.",
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
            lambda: nf4_matvec.run(np.zeros(64, F4), np.zeros(32, U1), np.zeros(1, F4), 64, 1, NF4),
            "nf4_matvec: x is float32 [64], but [m, in] of bfloat16, float16, float32 is needed. "
            "Reshape or convert it.",
        ),
        (
            lambda: nf4_matvec.run(np.zeros((1, 64), F4), np.zeros(32, U1), np.zeros(1, F4), 64, 2, NF4),
            "nf4_matvec: 128 weights in blocks of 64 have 64 bytes of codes and 2 scales, but "
            "there are [32] and [1]. Check the quantization state.",
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
