"""Shapes that hurt: every block size and odd rank, strided input, fresh memory full of nan, offsets beyond 2^31."""

import mmap

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from lorasurgery import plugins
from lorasurgery.kernels import (
    _dora_triton,
    _double_triton,
    _merge_nf4_triton,
    _merge_triton,
    _nf4_triton,
    _training_triton,
    dora_norm,
    grouped_lora,
    lora_linear,
    lora_merge,
    nf4_dequantize,
    nf4_linear,
    nf4_merge,
    nf4_quantize,
)
from lorasurgery.kernels._tuning import every
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = torch.from_numpy(NF4.copy())
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
RANKS = [1, 3, 7, 13, 64, 256]
KINDS = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that nobody has written is nan, or 0x7f where there is no nan."""

    def poison(make):
        def made(*args, **options):
            out = make(*args, **options)
            return out.fill_(torch.nan if out.is_floating_point() else 0x7F)

        return made

    for place, name in (
        (torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, poison(getattr(place, name)))


def moved(args):
    return [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]


def held(kernel, args, label=""):
    """The GPU's form against the definition: bit for bit, or within the tolerance that it has."""
    got, want = kernel.launch(*moved(args)), kernel.reference(*args)
    if hasattr(kernel, "tolerance"):
        error = (got.cpu().double() - want.double()).abs()
        assert bool((error <= kernel.tolerance(*args)).all()), label
        return
    results = zip(*((x if isinstance(x, tuple) else (x,)) for x in (got, want)), strict=True)
    for one, other in results:
        if isinstance(other, float):
            assert one == pytest.approx(other, rel=2e-6), label
        else:
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, msg=label)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_size_with_whole_and_short_last_blocks(block):
    for n, kind in ((3 * block, torch.bfloat16), (block + block // 2 + 5, torch.float16)):
        w = 0.02 * drawn(n).to(kind)
        held(nf4_quantize, (w, block), f"{n}")
        codes, absmax = nf4_quantize.reference(w, block)
        held(nf4_dequantize, (codes, absmax, block, n, kind, TABLE), f"{n}")
    # rows of two blocks, and one that ends inside of one
    for rows, columns in ((2, 2 * block), (1, block // 2 + 7)):
        codes, absmax = nf4_quantize.reference(0.02 * drawn(rows * columns), block)
        for m in (1, 17):
            x = drawn(m, columns, seed=m)
            held(nf4_linear, (x, codes, absmax, block, rows, TABLE), f"{rows}x{columns} {m}")
        a, b = drawn(2, columns), 0.01 * drawn(rows, 2)
        held(nf4_merge, (codes, absmax, block, a, b, torch.bfloat16), f"{rows}x{columns}")


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank(rank):
    rows, columns, block = 19, 70, 32
    a, b = drawn(rank, columns) / 8, drawn(rows, rank, seed=1) / 8
    for kind in KINDS:
        w = drawn(rows, columns, seed=2).to(kind)
        held(lora_merge, (w, a, b, kind), f"{kind}")
        for axis in (0, 1):
            held(dora_norm, (w, a, b, axis), f"{kind} {axis}")
    codes, absmax = nf4_quantize.reference(0.02 * drawn(rows * columns), block)
    held(nf4_merge, (codes, absmax, block, a, 0.1 * b, torch.float16))
    for m in (1, 5):
        for kind in KINDS:
            x = drawn(m, columns, seed=m).to(kind)
            held(lora_linear, (x, codes, absmax, block, rows, TABLE, a, b, 0.5), f"{m} {kind}")
    rng = torch.Generator().manual_seed(3)
    pages = grouped_lora.scatter((rank, 0, 2), (columns, rows, 16), torch.float32, rng)
    for m in (3, 130):
        # the second adapter has no rank, and the third no row
        adapter = torch.arange(m, dtype=torch.int32) % 2
        held(grouped_lora, (drawn(m, columns), adapter, *pages), f"{m}")


@pytest.mark.parametrize("kind", KINDS)
def test_strided_input(kind):
    rows, columns, block = 6, 64, 32
    codes, absmax = nf4_quantize.reference(0.02 * drawn(rows * columns), block)
    a, b = drawn(3, columns), drawn(rows, 3)
    layer = codes, absmax, block, rows, TABLE
    every_other = drawn(2 * 3, columns).to(kind)[::2]
    transposed = drawn(columns, 3).to(kind).T
    for x in (every_other, transposed):
        held(nf4_linear, (x, *layer))
        held(lora_linear, (x, *layer, drawn(columns, 3).T, drawn(3, rows).T, 1.5))
    w = drawn(columns, rows).to(kind).T
    held(lora_merge, (w, drawn(columns, 3).T, drawn(3, rows).T, kind))
    held(dora_norm, (w, a, b, 0))
    held(dora_norm, (w, a, b, 1))
    held(nf4_quantize, (drawn(200).to(kind)[::2], block))
    sparse = codes.repeat_interleave(2)[::2], absmax.repeat_interleave(2)[::2]
    held(nf4_dequantize, (*sparse, block, rows * columns, kind, TABLE))


@pytest.mark.parametrize("name", [
    n for n in plugins.names("kernels") if hasattr(plugins.load("kernels", n), "launch")
])  # fmt: skip
def test_every_configuration_gives_the_result(name):
    kernel, inputs = plugins.load("kernels", name), {}
    for label, args in kernel.cases(torch.Generator().manual_seed(0)):
        inputs.setdefault(str([x.dtype for x in args if hasattr(x, "dtype")]), (label, args))
    for label, args in list(inputs.values())[:3]:
        # each configuration writes over what the one before it wrote
        with every():
            held(kernel, args, label)


# --- offsets beyond 2^31 elements, in memory that is mapped and hardly touched

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
        BLOCK=64, BFLOAT=False, SIZE=size,
    )  # fmt: skip
    assert out[-4:].tolist() == [2, -2, -2, 2]
    again, scales = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    last_program(
        monkeypatch, _nf4_triton.quantize, (n // 2048,), out, scales, again, TABLE.to(DEVICE), n, 0,
        0, 0, KEEP=False, CHANCE=False, BLOCK=64, ROWS=32,
    )  # fmt: skip
    assert (again[-2:].tolist(), scales[-1].item()) == ([0xF0, 0x0F], 2)


def test_merged_nf4_is_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 1, 4096
    n, programs = rows * columns, rows * columns // 1024
    codes, absmax = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    packed, scales = far(n // 2, torch.uint8), far(n // 64, torch.float32)
    codes[-1], absmax[-1] = 0xF7, 1.0
    a, b = far(columns, torch.float32), far(rows, torch.float32)
    a[-1], b[-1] = -0.5, 2.0
    partial = torch.zeros(3, programs, dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _merge_nf4_triton.merge, (programs,), codes, absmax, a, b, packed, scales,
        partial, TABLE.to(DEVICE), n, columns, 1, 0, 0, 0, KEEP=False, CHANCE=False,
        DTYPE="float32", BLOCK=64, ROWS=16,
    )  # fmt: skip
    # levels 1 and 0, and -1 added to the last
    assert (packed[-1].item(), scales[-1].item()) == (0xF0, 1)
    assert partial[:, -1].tolist() == [1, 1, 0]


def test_dense_weights_are_found_beyond_two_billion(monkeypatch):
    rows, columns = (FAR >> 12) + 16, 4096
    w, out = far(rows * columns, torch.float16), far(rows * columns, torch.float16)
    a, b = far(columns, torch.float32), far(rows, torch.float32)
    w[-1], a[-1], b[-1] = 0.5, -1.0, 2.0
    grid = rows // 8, columns // 128
    partial = torch.zeros(3, grid[0] * grid[1], dtype=torch.float64, device=DEVICE)
    last_program(
        monkeypatch, _merge_triton.merge, grid, w, a, b, out, partial, rows, columns, 1, 0, 0, 0,
        BFLOAT=False, KIND="float16", CHANCE=False, ROWS=8, COLUMNS=128,
    )  # fmt: skip
    assert out[-1].item() == -1.5
    assert partial[:, -1].tolist() == [4, 4, 0]
    norms = far(rows, torch.float32)
    last_program(
        monkeypatch, _dora_triton.row_norms, (rows // 8,), w, a, b, norms, rows, columns, 1,
        ROWS=8, COLUMNS=4096,
    )  # fmt: skip
    assert norms[-1].item() == 1.5
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
