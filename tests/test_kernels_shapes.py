"""Shapes that hurt: every block size and odd rank, strided input, every configuration, fresh memory full of nan."""

import pytest
import torch

from lorasurgery import plugins
from lorasurgery.kernels import (
    adalora_budget,
    adalora_importance,
    dora_norm,
    dora_output,
    double_dequantize,
    double_quantize,
    grouped_lora,
    lora_adamw,
    lora_linear,
    lora_merge,
    nf4_decode_merge,
    nf4_dequantize,
    nf4_encode_merge,
    nf4_linear,
    nf4_merge,
    nf4_quantize,
)
from lorasurgery.kernels._tuning import every
from lorasurgery.kernels.nf4_dequantize import NF4

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TABLE = torch.from_numpy(NF4.copy())
BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]
RANKS = [1, 3, 7, 13, 64, 256]
KINDS = [torch.bfloat16, torch.float16, torch.float32]


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
        elif other.dtype == torch.float64 and other.numel():
            # sums of terms that may cancel, beside the largest of their kind
            assert ((one.cpu() - other).abs() <= 1e-12 * other.abs().amax(0)).all(), label
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
        out_of = codes, absmax, block, a, b, torch.bfloat16, torch.float16
        held(nf4_decode_merge, out_of, f"{rows}x{columns}")
        w, seen = drawn(rows, columns), drawn(rows, columns, seed=1).half()
        held(nf4_encode_merge, (w, block, a, b), f"{rows}x{columns}")
        held(nf4_encode_merge, (w, block, a, b, None, None, 0, seen), f"{rows}x{columns} seen")
        low = drawn(5, columns), codes, absmax, block, rows, TABLE, a, b, 0.5
        held(lora_linear, low, f"{rows}x{columns}")


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
    held(nf4_decode_merge, (codes, absmax, block, a, 0.1 * b, torch.float16, torch.float32))
    held(nf4_encode_merge, (drawn(rows, columns).bfloat16(), block, a, 0.1 * b))
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
    turned = drawn(columns, 3).T, 0.01 * drawn(3, rows).T
    held(nf4_merge, (*sparse, block, *turned, kind))
    held(nf4_decode_merge, (*sparse, block, *turned, kind, kind))
    held(nf4_encode_merge, (w, block, *turned, sparse[1]))
    held(nf4_encode_merge, (w, block, *turned, None, None, 0, drawn(columns, rows).bfloat16().T))
    base, lora = drawn(rows, columns, 2).to(kind).unbind(2)
    held(dora_output, (base, lora, drawn(columns, 2).abs()[:, 0], drawn(columns).abs() + 1))


def test_strided_state_of_training_and_scales():
    w, grad, m, v = drawn(2 * 70, 4).abs().T[:, ::2]
    held(lora_adamw, (w, grad, m, v, 30, 2, lora_adamw.Rates(1e-2)))
    for axis in (0, 1):
        held(adalora_importance, (*(x.view(7, 10).T for x in drawn(4, 70).abs()), axis))
    held(adalora_budget, (w, grad, m, v, 20))
    held(double_quantize, (drawn(600).abs()[::2],))
    q, nested, offset = double_quantize.reference(drawn(600).abs())
    twice = q.repeat_interleave(2)[::2], nested.repeat_interleave(2)[::2]
    held(double_dequantize, (*twice, offset))
    pages = grouped_lora.scatter((2, 3), (40, 24, 16), torch.float32, torch.Generator())
    pool, *index = pages
    adapter = torch.tensor([1, 0, 0, 1], dtype=torch.int32).repeat(2)[::2]
    base = drawn(24, 4).T
    held(grouped_lora, (drawn(40, 4).T, adapter, pool, *index, base))
    held(grouped_lora, (drawn(8, 80)[::2, ::2], adapter, pool, *index, base))


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
