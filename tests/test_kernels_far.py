"""Offsets beyond 2^31 elements, in memory that is mapped and hardly touched."""

import mmap

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from lorasurgery.kernels import (
    _dora_triton,
    _double_triton,
    _merge_mixed_triton,
    _merge_nf4_triton,
    _merge_triton,
    _nf4_linear_triton,
    _nf4_triton,
    _training_triton,
)
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = torch.from_numpy(NF4.copy())
FAR = 1 << 31


def far(count, dtype):
    """Zeros; on a CPU only the pages that are written take memory."""
    if DEVICE == "cuda":
        return torch.zeros(count, dtype=dtype, device=DEVICE)
    size = count * torch.zeros(0, dtype=dtype).element_size()
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)


def last_program(monkeypatch, kernel, grid, *args, **constants):
    """The whole grid on a GPU; the interpreter is told that its one program is the last."""
    if DEVICE == "cuda":
        kernel[grid](*args, **constants)
        return
    builder = interpreter.interpreter_builder
    places, sizes = (
        [interpreter.TensorHandle(np.array([g - d], np.int32), triton.language.int32) for g in grid]
        for d in (1, 0)
    )
    with monkeypatch.context() as patched:
        patched.setattr(builder, "create_get_program_id", places.__getitem__)
        patched.setattr(builder, "create_get_num_programs", sizes.__getitem__)
        kernel[(1,) * len(grid)](*args, **constants)


def test_nf4_is_found_beyond_two_billion(monkeypatch):
    n, size = FAR + 4096, 4096
    codes, absmax, out = (
        far(n // 2, torch.uint8),
        far(n // 64, torch.float32),
        far(n, torch.float16),
    )
    codes[-2:], absmax[-1] = torch.tensor([0xF0, 0x0F]), 2.0
    last_program(
        monkeypatch, _nf4_triton.dequantize, (n // size,), codes, absmax, TABLE.to(DEVICE), out, n,
        n // 2, BLOCK=64, BFLOAT=False, SIZE=size,
    )  # fmt: skip
    assert out[-4:].tolist() == [2, -2, -2, 2]
    again, scales = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    last_program(
        monkeypatch, _nf4_triton.quantize, (n // 2048,), out, scales, again, TABLE.to(DEVICE), n,
        n // 2, 0, 0, 0, KEEP=False, CHANCE=False, BLOCK=64, ROWS=32,
    )  # fmt: skip
    assert (again[-2:].tolist(), scales[-1].item()) == ([0xF0, 0x0F], 2)
    sums = torch.zeros(2, n // 2048, dtype=torch.float64, device=DEVICE)
    largest = torch.zeros(n // 2048, device=DEVICE)
    out[-1] = 1.5
    last_program(
        monkeypatch, _nf4_triton.error, (n // 2048,), out, again, scales, TABLE.to(DEVICE), sums,
        largest, n, n // 2, BLOCK=64, ROWS=32,
    )  # fmt: skip
    # 2 stands where 1.5 was; the other 63 weights of the last block are 2 and -2 as they were
    assert (sums[:, -1].tolist(), largest[-1].item()) == ([0.25, 63 * 4 + 2.25], 0.5)


def test_merged_nf4_is_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 1, 4096
    n, programs = rows * columns, rows * columns // 1024
    codes, absmax = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    packed, scales = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    codes[-1], absmax[-1] = 0xF7, 1.0
    a, b = far(columns, torch.float32), far(rows, torch.float32)
    a[-1], b[-1] = -0.5, 2.0
    moments = far(n // 64 * 6, torch.float64)
    last_program(
        monkeypatch, _merge_nf4_triton.merge, (programs,), codes, absmax, a, b, packed, scales,
        moments, TABLE.to(DEVICE), n, n // 2, columns, 1, 0, 0, 0, KEEP=False, CHANCE=False,
        DTYPE="float32", WHOLE=True, BLOCK=64, ROWS=16,
    )  # fmt: skip
    # levels 1 and 0, and -1 added to the last
    assert (packed[-1].item(), scales[-1].item()) == (0xF0, 1)
    # no error, and the change of -1 at a level of -1; all levels are 1 or -1
    assert moments[-6:].tolist() == [0, 0, 1, 0, 64, 1]


def test_merges_out_of_nf4_and_into_it_are_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 1, 4096
    n, programs = rows * columns, rows * columns // 1024
    codes, absmax = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    dense = far(n, torch.float16)
    codes[-1], absmax[-1] = 0xF7, 1.0
    a, b = far(columns, torch.float32), far(rows, torch.float32)
    a[-1], b[-1] = -0.5, 2.0
    partial = torch.zeros(3, programs, dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _merge_mixed_triton.decode_merge, (programs,), codes, absmax, a, b, dense,
        partial, TABLE.to(DEVICE), n, n // 2, columns, 1, 0, 0, 0, DTYPE="float32", KIND="float16",
        CHANCE=False, WHOLE=True, BLOCK=64, ROWS=16,
    )  # fmt: skip
    # levels 1 and 0, and -1 added to the last
    assert dense[-2:].tolist() == [1, -1]
    assert partial[:, -1].tolist() == [1, 1, 0]
    packed, scales = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    moments = far(n // 64 * 6, torch.float64)
    last_program(
        monkeypatch, _merge_mixed_triton.encode_merge, (programs,), dense, dense, scales, a, -b,
        packed, scales, moments, TABLE.to(DEVICE), n, n // 2, columns, 1, 0, 0, 0, BFLOAT=False,
        SEEN=True, SEEN_BFLOAT=False, KEEP=False, CHANCE=False, WHOLE=True, BLOCK=64, ROWS=16,
    )  # fmt: skip
    # and 1 added to the last again
    assert (packed[-1].item(), scales[-1].item()) == (0xF7, 1)
    # the changed one has level 0
    assert moments[-6:].tolist() == [0, 0, 1, 0, 63, 0]


def test_rows_of_products_are_found_beyond_two_billion(monkeypatch):
    m, n, k = (FAR >> 12) + 64, 4096, 64
    x, out = far(m * k, torch.float16), far(m * n, torch.float16)
    codes, absmax = far(n * k // 2, torch.uint8), far(n, torch.float32)
    # the last row of W is ones, and all others minus ones of scale 0
    codes[-k // 2 :], absmax[-1], x[-k:] = 0xFF, 1.0, 0.5
    table, weight = TABLE.to(DEVICE), {"BLOCK": 64, "NESTED": 0, "ODD": False}
    whole = codes, absmax, table, table, table, table
    sizes = {"LOW": False, "BR": 16, "BM": 32, "BN": 32, "BK": 64}
    last_program(
        monkeypatch, _nf4_linear_triton.forward, (m // 32, n // 32, 1), x, *whole, x, x, x, out,
        m, n, k, k // 2, k, 0, 1, BIAS=False, **weight, **sizes,
    )  # fmt: skip
    assert out[-2:].tolist() == [0, 32]
    # g W, where g is that output and W its transpose's size
    g, turned = far(m * k, torch.float16), far(m * n, torch.float16)
    g[-k:], codes[:], absmax[:] = 0.25, 0xFF, 2.0
    last_program(
        monkeypatch, _nf4_linear_triton.backward, (m // 32, n // 64), g, *whole, g, g, turned,
        m, k, n, n // 2, 0, LOW=False, BR=16, BM=32, BN=32, BK=64, **weight,
    )  # fmt: skip
    assert turned[-2:].tolist() == [32, 32]


def test_dense_weights_are_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 16, 4096
    w, out = far(rows * columns, torch.float16), far(rows * columns, torch.float16)
    a, b = far(columns, torch.float32), far(rows, torch.float32)
    w[-1], a[-1], b[-1] = 0.5, -1.0, 2.0
    grid = rows // 8, columns // 128
    partial = torch.zeros(3, grid[0] * grid[1], dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _merge_triton.merge, grid, w, a, b, a, out, partial, rows, columns, 1, 0, 0, 0,
        GAIN=False, BFLOAT=False, KIND="float16", CHANCE=False, ROWS=8, COLUMNS=128,
    )  # fmt: skip
    assert out[-1].item() == -1.5
    assert partial[:, -1].tolist() == [4, 4, 0]
    norms = far(rows, torch.float32)
    last_program(
        monkeypatch, _dora_triton.row_norms, (rows // 8,), w, a, b, norms, rows, columns, 1,
        ROWS=8, COLUMNS=4096,
    )  # fmt: skip
    assert norms[-1].item() == 1.5
    # twice the norm, so that a gain is two where there is any
    m, gain = 2 * norms, far(rows, torch.float32)
    last_program(
        monkeypatch, _merge_triton.gains, (rows // 8,), w, a, b, m, gain, rows, columns, 1,
        BFLOAT=False, ROWS=8, LANES=64, HALVINGS=6,
    )  # fmt: skip
    assert gain[-1].item() == 2
    last_program(
        monkeypatch, _merge_triton.merge, grid, w, a, b, gain, out, partial, rows, columns, 1, 0, 0,
        0, GAIN=True, BFLOAT=False, KIND="float16", CHANCE=False, ROWS=8, COLUMNS=128,
    )  # fmt: skip
    assert out[-1].item() == -3
    assert partial[:, -1].tolist() == [12.25, 12.25, 0]
    squares, grid = (
        torch.zeros(rows // 16, columns, dtype=torch.float64, device=DEVICE),
        (32, rows // 16),
    )
    last_program(
        monkeypatch, _dora_triton.column_norms, grid, w, a, b, squares, rows, columns, 1, 1,
        ROWS=16, COLUMNS=128,
    )  # fmt: skip
    assert squares[-1, -1].item() == 2.25


def test_outputs_are_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 16, 4096
    n = rows * columns
    base, out = far(n, torch.float16), far(n, torch.float16)
    scale = torch.full((columns,), 3.0, device=DEVICE)
    base[-1] = 2
    last_program(
        monkeypatch, _dora_triton.scaled, (n // 1024,), base, base, scale, out, n, columns,
        LORA=True, BFLOAT=False, SIZE=1024,
    )  # fmt: skip
    assert out[-1].item() == 12
    sums = torch.zeros(rows // 16, columns, dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _dora_triton.scaled_backward, (rows // 16, 32), base, base, base, scale, out,
        sums, rows, columns, LORA=False, BFLOAT=False, ROWS=16, COLUMNS=128,
    )  # fmt: skip
    assert (out[-1].item(), sums[-1, -1].item()) == (6, 4)


def test_training_s_state_is_found_beyond_two_billion(monkeypatch):
    n, size = FAR + 1024, 1024
    state, *out = (far(n, torch.float32) for _ in range(4))
    state[-1] = 2
    #            decay, 1 - β1, β2, 1 - β2, root, ε, rate: and the same again for B
    numbers = torch.tensor([[1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [1, 1, 0, 1, 1, 0, 0.5]])
    last_program(
        monkeypatch, _training_triton.adamw, (n // size,), state, state, state, state,
        numbers.to(DEVICE), *out, n, FAR, SIZE=size,
    )  # fmt: skip
    # w - rate · m / √v, with m = g and v = g²
    assert [x[-1].item() for x in out] == [1.5, 2, 4]
    rows = n // 1024
    betas = torch.tensor([0.0, 1.0, 0.0, 1.0], device=DEVICE)
    partial = torch.zeros(1, rows, dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _training_triton.importance, (rows, 1), state, state, state, state, betas,
        *out[:2], partial, rows, 1024, TRIPLETS_FIRST=True, TRIPLETS=1, ITEMS=1024,
    )  # fmt: skip
    assert [x[-1].item() for x in out[:2]] == [4, 0]


def test_scales_are_found_beyond_two_billion(monkeypatch):
    n = FAR + 1024
    absmax, q, nested = far(n, torch.float32), far(n, torch.uint8), far(n // 256, torch.float32)
    absmax[-1] = 3
    offset, levels = torch.ones(1, device=DEVICE), torch.arange(256.0, device=DEVICE)
    positions = torch.arange(1 << 16, device=DEVICE).div(256, rounding_mode="floor").to(torch.uint8)
    last_program(
        monkeypatch, _double_triton.quantize, (n // 256,), absmax, offset, positions, q, nested, n,
        BLOCK=256,
    )  # fmt: skip
    assert (q[-1].item(), nested[-1].item()) == (255, 2)
    last_program(
        monkeypatch, _double_triton.dequantize, (n // 1024,), q, nested, levels, offset, absmax, n,
        BLOCK=256, SIZE=1024,
    )  # fmt: skip
    assert absmax[-1].item() == 511
