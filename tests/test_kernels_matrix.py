"""Kernels that multiply: each form within rounding of the definition, gradients, operators of torch, far offsets."""

import mmap
import re

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from lorasurgery import plugins
from lorasurgery.arrays import from_torch
from lorasurgery.errors import ShapeError, UsageError
from lorasurgery.kernels import (
    _grouped_launch,
    _nf4_linear_launch,
    double_dequantize,
    double_quantize,
    grouped_lora,
    lora_linear,
    nf4_dequantize,
    nf4_linear,
    nf4_matvec,
    nf4_quantize,
)
from lorasurgery.kernels._packed import Packed
from lorasurgery.kernels._tile_triton import odd_weights, weights
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns where masked numbers are nan or inf
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATRIX = ["grouped_lora", "lora_linear", "nf4_linear"]
TABLE = torch.from_numpy(NF4.copy())


def cases(name):
    kernel = plugins.load("kernels", name)
    return kernel, kernel.cases(torch.Generator().manual_seed(0))


def as_array(arg):
    return from_torch(arg) if isinstance(arg, torch.Tensor) else arg


def to(device, args):
    return [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]


def packed(n, k, block=64, seed=0, double=False):
    rng = torch.Generator().manual_seed(seed)
    codes, absmax = nf4_quantize.reference(0.05 * torch.randn(n * k, generator=rng), block)
    if double:
        q, nested, offset = double_quantize.reference(absmax)
        return Packed(codes, q, block, n, TABLE, nested, offset)
    return Packed(codes, absmax, block, n, TABLE, None, None)


def test_all_that_have_a_tolerance_are_tried():
    found = plugins.names("kernels")
    assert [n for n in found if hasattr(plugins.load("kernels", n), "tolerance")] == MATRIX


@pytest.mark.parametrize("name", MATRIX)
def test_every_form_is_within_rounding_of_the_definition(name):
    kernel, inputs = cases(name)
    for label, args in inputs:
        want, limit = kernel.reference(*args), kernel.tolerance(*args)
        got = {
            "tensors": kernel.run(*args),
            "arrays": torch.from_numpy(kernel.run(*map(as_array, args)).astype(np.float32)),
            "triton": kernel.launch(*to(DEVICE, args)).cpu(),
        }
        assert got["tensors"].dtype == got["triton"].dtype == want.dtype
        for form, y in got.items():
            assert y.shape == want.shape, f"{name} {label} {form}"
            error = (y.double() - want.double()).abs()
            assert bool((error <= limit).all()), f"{name} {label} {form}: {error.max()}"


@pytest.mark.parametrize("name", MATRIX)
def test_tolerance_would_not_hide_a_part_that_is_missing(name):
    kernel, inputs = cases(name)
    label, args = next(c for c in inputs if c[1][0].dtype == torch.float32 and len(c[1][0]) > 2)
    x = args[0].clone()
    x[:, 3] = 0
    missing = kernel.reference(x, *args[1:]) - kernel.reference(*args)
    seen = (missing.abs() > kernel.tolerance(*args))[missing != 0]
    assert len(seen) > 100, label
    assert float(seen.float().mean()) > 0.9, label


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("m", "unpacked"), [(1, 0), (8, 0), (9, 1)])
def test_on_a_cpu_few_rows_never_unpack_the_weight(m, unpacked, double, monkeypatch):
    w, x = packed(40, 128, double=double), np.ones((m, 128), np.float32)
    args = [as_array(t) for t in (w.codes, w.absmax, w.block, w.rows, w.table)]
    nested = as_array(w.nested), as_array(w.offset)
    calls, plain = [], nf4_dequantize.cpu
    monkeypatch.setattr(nf4_dequantize, "cpu", lambda *a: calls.append(a) or plain(*a))
    y = nf4_linear.run(x, *args, None, *nested)
    assert len(calls) == unpacked
    a, b = np.zeros((2, 128), np.float32), np.zeros((40, 2), np.float32)
    np.testing.assert_array_equal(lora_linear.run(x, *args, a, b, 1.0, None, *nested), y)
    # the bits of the kernel for few rows
    if not unpacked:
        scales = double_dequantize.run(args[1], *nested) if double else args[1]
        np.testing.assert_array_equal(y, nf4_matvec.run(x, args[0], scales, 64, 40, NF4))


# --- gradients


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("double", [False, True])
def test_definitions_pass_gradcheck(double):
    w = packed(5, 12, 4, double=double)
    rng = torch.Generator().manual_seed(1)
    draw = [
        torch.randn(s, generator=rng, dtype=torch.float64) for s in ((3, 12), (2, 12), (5, 2), (5,))
    ]
    x, a, b, bias = leaves(*draw)
    args = w.codes, w.absmax.double() if not double else w.absmax, w.block, w.rows, w.table.double()
    assert torch.autograd.gradcheck(
        lambda x, bias: nf4_linear.reference(x, *args, bias, w.nested, w.offset), (x, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, a, b, bias: lora_linear.reference(x, *args, a, b, 0.7, bias, w.nested, w.offset),
        (x, a, b, bias),
    )


def test_definition_of_grouped_lora_passes_gradcheck():
    rng = torch.Generator().manual_seed(2)
    pool, *index = grouped_lora.scatter((2, 0, 3), (6, 5, 4), torch.float64, rng)
    adapter = torch.tensor([0, 2, -1, 2], dtype=torch.int32)
    x, base = leaves(
        torch.randn(4, 6, generator=rng).double(), torch.randn(4, 5, generator=rng).double()
    )
    index[1] = index[1].double()
    assert torch.autograd.gradcheck(
        lambda x, base: grouped_lora.reference(x, adapter, pool, *index, base), (x, base)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 7, 33])
def test_gradients_of_the_operator_are_those_of_the_definition(dtype, rank):
    w, rng = packed(36, 96, double=rank == 7), torch.Generator().manual_seed(rank)
    draw = [
        torch.randn(s, generator=rng) / 4 for s in ((5, 96), (rank, 96), (36, rank), (36,), (5, 36))
    ]
    x, a, b, bias, g = (t.to(dtype) for t in draw)
    args = w.codes, w.absmax, w.block, w.rows, w.table
    found = []
    for form in (lora_linear.run, lora_linear.reference):
        inputs = leaves(x, a.float(), b, bias)
        form(inputs[0], *args, inputs[1], inputs[2], 0.5, inputs[3], w.nested, w.offset).backward(g)
        found.append([t.grad for t in inputs])
    # u, h and each sum are rounded: a few roundings of terms below 1, of which up to 96 are summed
    limit = 12 * torch.finfo(dtype).eps
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=limit, atol=max(limit, 1e-5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "k", "block"), [(1, 70, 96, 32), (70, 40, 130, 64), (17, 33, 63, 64)]
)
def test_triton_s_gradient_for_x_is_g_w_and_the_low_rank_term(dtype, m, n, k, block):
    w, rng = packed(n, k, block), torch.Generator().manual_seed(m)
    g, h, a = (torch.randn(s, generator=rng).to(dtype) for s in ((m, n), (m, 7), (7, k)))
    dense = nf4_linear.reference(torch.eye(k, dtype=dtype), w.codes, w.absmax, block, n, TABLE).T
    plain, low = g.double() @ dense.double(), h.double() @ a.double()
    size = g.double().abs() @ dense.double().abs() + h.double().abs() @ a.double().abs()
    moved = Packed(*to(DEVICE, (w.codes, w.absmax, block, n, TABLE, None, None)))
    g, h, a = to(DEVICE, (g, h, a))
    for given, want in ((None, plain), ((h, a), plain + low)):
        got = _nf4_linear_launch.backward(g, k, moved, given).cpu().double()
        assert bool(((got - want).abs() <= size * 1e-5 + want.abs() * torch.finfo(dtype).eps).all())


def test_gradients_of_grouped_lora_are_those_of_the_definition():
    rng = torch.Generator().manual_seed(4)
    pages = grouped_lora.scatter((3, 0, 13), (40, 24, 16), torch.float32, rng)
    adapter = torch.tensor([2, 0, -1, 2, 1], dtype=torch.int32)
    draw = [torch.randn(s, generator=rng) for s in ((5, 40), (5, 24), (5, 24))]
    found = []
    for form in (grouped_lora.run, grouped_lora.reference):
        x, base = leaves(*draw[:2])
        form(x, adapter, *pages, base).backward(draw[2])
        found.append((x.grad, base.grad))
    torch.testing.assert_close(found[0], found[1])


def test_a_gradient_for_the_pool_is_refused():
    rng = torch.Generator().manual_seed(4)
    pool, *index = grouped_lora.scatter((3,), (8, 8, 8), torch.float32, rng)
    message = (
        "grouped_lora: the pool asks for a gradient, but only x and base have one. "
        "Detach it, and train an adapter by lora_linear."
    )
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        grouped_lora.run(torch.ones(2, 8), torch.zeros(2).int(), pool.requires_grad_(), *index)


def test_backward_keeps_the_packed_weight_and_no_dense_one():
    w, kept = packed(64, 128), []
    x = torch.randn(3, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nf4_linear.run(x, w.codes, w.absmax, 64, 64, TABLE)
    assert sorted(t.numel() for t in kept) == [16, 128, 64 * 64]


# --- operators


def samples():
    rng = torch.Generator().manual_seed(5)
    w = packed(6, 32, 32, double=True)
    x, a, b, bias = leaves(
        *(torch.randn(s, generator=rng) for s in ((3, 32), (2, 32), (6, 2), (6,)))
    )
    args = w.codes, w.absmax, w.block, w.rows, w.table
    pages = grouped_lora.scatter((2, 3), (32, 6, 8), torch.float32, rng)
    adapter, base = (
        torch.tensor([1, -1, 0], dtype=torch.int32),
        torch.randn(3, 6, requires_grad=True),
    )
    return {
        "nf4_linear": (x, *args, bias, w.nested, w.offset),
        "lora_linear": (x, *args, a, b, 0.5, bias, w.nested, w.offset),
        "grouped_lora": (x, adapter, *pages, base),
    }


@pytest.mark.parametrize("name", MATRIX)
def test_operator_keeps_torch_s_rules(name):
    from lorasurgery.kernels import _ops

    torch.library.opcheck(getattr(_ops, name), samples()[name])


@pytest.mark.parametrize("name", MATRIX)
def test_compiled_graph_holds_the_operator_whole_and_gives_the_same(name):
    kernel, args = plugins.load("kernels", name), samples()[name]
    compiled = torch.compile(kernel.run, backend="aot_eager", fullgraph=True)
    for form in (kernel.run, compiled):
        args[0].grad = None
        y = form(*args)
        y.sum().backward()
        found = (y, args[0].grad.clone())
        if form is kernel.run:
            want = found
    torch.testing.assert_close(found, want, rtol=0, atol=0)


# --- far offsets, in memory that is mapped and hardly touched


def far(count, dtype):
    """Zeros; on a CPU only the pages that are written take memory."""
    if DEVICE == "cuda":
        return torch.zeros(count, dtype=dtype, device=DEVICE)
    size = count * torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype)


@triton.jit
def _take(codes, absmax, table, rows, out, n, k, half, ODD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.arange(0, 2))
    if ODD:
        w = odd_weights(
            codes, absmax, table, table, table, table, row, 0, n, k, BLOCK, 0, 64
        )  # fmt: skip
    else:
        w = weights(
            codes, absmax, table, table, table, table, row, 0, n, half, BLOCK, 0, 2, 64
        )  # fmt: skip
    tl.store(out + tl.arange(0, 2)[:, None] * 64 + tl.arange(0, 64)[None, :], w)


@pytest.mark.parametrize("odd", [False, True])
def test_weights_beyond_four_billion_are_found(odd):
    k, block = (1 << 20, 64) if not odd else ((1 << 20) + 32, 64)
    n = 4200  # n · k / 2 is more than 2^31 bytes
    codes, absmax = far(n * k // 2, torch.uint8), far(n * k // block, torch.float32)
    rows, out = torch.tensor([4198, 4099], device=DEVICE), torch.zeros(2, 64, device=DEVICE)
    for i, row in enumerate(rows.tolist()):
        start = row * k
        codes[start // 2 : start // 2 + 32] = 0xF0 if i else 0x0F
        absmax[start // block : start // block + 2] = i + 2
    _take[(1,)](codes, absmax, TABLE.to(DEVICE), rows, out, n, k, k // 2, ODD=odd, BLOCK=block)
    want = torch.tensor([[-2.0, 2.0], [3.0, -3.0]]).repeat(1, 32)
    torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_pages_and_rows_beyond_two_billion_elements_are_found():
    page, stride = 1 << 12, 1 << 20
    pool = far((1 << 31) + 4 * page, torch.float16).view(-1, page)
    x = far((1 << 31) + 3 * stride, torch.float16).view(-1, stride)[2047:2050, :64]
    x.fill_(0.5)
    last = len(pool) - 1
    pool[last, :64], pool[last - 1, :24] = 0.25, 2.0
    starts, scales = torch.tensor([0, 1], device=DEVICE).int(), torch.ones(1, device=DEVICE)
    pages = [torch.tensor([[p]], device=DEVICE).int() for p in (last, last - 1)]
    adapter = torch.zeros(3, device=DEVICE).int()
    p = grouped_lora.Pages(pool, starts, scales, *pages, 1, 24)
    for by in (_grouped_launch.by_rows, _grouped_launch.by_tiles):
        torch.testing.assert_close(by(x, adapter, p, None).cpu(), torch.full((3, 24), 16.0).half())


# --- what is refused

F4, U1, I4, BF = np.float32, np.uint8, np.int32, np.dtype(ml_dtypes.bfloat16)
W = np.zeros(64, U1), np.zeros(2, F4), 64, 2, NF4  # [2, 64]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: nf4_linear.run(np.zeros((3, 64)), *W),
            "nf4_linear: x is float64 [3, 64] and the bias float64, but [m, in] and a bias of one "
            "dtype, of bfloat16, float16, float32, are needed. Reshape or convert them.",
        ),
        (
            lambda: nf4_linear.run(np.zeros((3, 64), F4), *W, np.zeros(3, F4)),
            "nf4_linear: the bias is [3], but the weight has 2 rows. Is it of another layer?",
        ),
        (
            lambda: nf4_linear.run(np.zeros((3, 32), F4), *W),
            "nf4_linear: 64 weights in blocks of 64 have 32 bytes of codes and 1 scales, but there "
            "are [64] and [2]. Check the quantization state.",
        ),
        (
            lambda: nf4_linear.run(np.zeros((3, 64), F4), *W[:4], NF4[:8]),
            "nf4_linear: the table is float32 [8], but float32 [16] is needed. Restore the file.",
        ),
        (
            lambda: nf4_linear.run(np.zeros((3, 64), F4), *W, None, np.zeros(1, F4), F4(0)),
            "nf4_linear: scales float32 [2] are nested in float32 [1], but uint8 [n], float32 "
            "[ceil(n / 256)] and an offset are needed. Check the quantization state.",
        ),
        (
            lambda: lora_linear.run(np.zeros((3, 64), F4), *W, np.zeros((2, 64), F4), np.zeros((2, 3), F4), 1.0),
            "lora_linear: A is float32 [2, 64] and B is float32 [2, 3], but [r, 64] and [2, r] of "
            "bfloat16, float16, float32 are needed. Transpose or pair them rightly.",
        ),
        (
            lambda: grouped_lora.run(
                np.zeros((3, 64), F4), np.zeros(3, I4), np.zeros((9, 16), BF), np.zeros(2, I4),
                np.zeros(1, F4), np.zeros((2, 3), I4), np.zeros((2, 1), I4), 2, 8,
            ),
            "grouped_lora: pool is bfloat16 [9, 16], but float32 [9, 16] is needed; a_pages is int32 "
            "[2, 3], but int32 [2, 4] is needed. Lay the pages out for this layer.",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ShapeError, match=f"^{re.escape(message)}$"):
        call()
