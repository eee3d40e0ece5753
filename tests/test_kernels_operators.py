"""Kernels as operators of torch: each has one, which keeps torch's rules, and a compiled graph holds it whole."""

import numpy as np
import pytest
import torch

from lorasurgery import plugins
from lorasurgery.kernels import (
    _dora_ops,
    _merge_ops,
    _nf4_ops,
    _ops,
    _training_ops,
    adalora_budget,
    adalora_importance,
    double_dequantize,
    double_quantize,
    lora_adamw,
    lora_merge,
    nf4_dequantize,
    nf4_quantize,
)
from lorasurgery.kernels.lora_adamw import Rates
from lorasurgery.kernels.nf4_dequantize import NF4

OPERATORS = torch.ops.lorasurgery
KINDS = torch.bfloat16, torch.float16, torch.float32
TABLE = torch.from_numpy(NF4.copy())
# rows that end inside of a block, and a short last block
ROWS, COLUMNS, BLOCK, RANK = 3, 15, 32, 2
RATES = Rates(1e-3).listed


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def factors():
    return 0.1 * drawn(RANK, COLUMNS), 0.1 * drawn(ROWS, RANK)


def packed():
    return nf4_quantize.reference(drawn(ROWS * COLUMNS), BLOCK)


def samples():
    """(operator, its arguments): every output, every policy."""
    w, (a, b), (codes, absmax) = drawn(ROWS, COLUMNS), factors(), packed()
    for kind in KINDS:
        yield "nf4_quantize", (w.flatten().to(kind), BLOCK, None, None, 0)
        yield "nf4_dequantize", (codes, absmax, BLOCK, w.numel(), kind, TABLE)
        yield "lora_merge", (w.to(kind), a, b, kind, None, 0)
        yield "nf4_decode_merge", (codes, absmax, BLOCK, a, b, torch.bfloat16, kind, None, 0)
    yield "nf4_quantize", (w.flatten(), BLOCK, absmax, None, 0)
    yield "nf4_quantize", (w.flatten(), BLOCK, None, 3, 7)
    q, nested, offset = double_quantize.reference(absmax)
    yield "double_quantize", (absmax, 2)
    yield (
        "double_dequantize",
        (q, nested, offset, 256, torch.from_numpy(double_dequantize.TABLE.copy())),
    )
    yield "nf4_error", (w.flatten(), codes, absmax, BLOCK)
    yield "nf4_matvec", (drawn(2, COLUMNS), codes, absmax, BLOCK, ROWS, TABLE)
    yield "nf4_moments", (codes, absmax, BLOCK, w.flatten().bfloat16(), w.flatten(), TABLE)
    yield "lora_delta", (a, b)
    yield "lora_merge", (w.T.contiguous().T, a, b, torch.bfloat16, -5, 7)
    yield "dora_merge", (w, a, b, drawn(ROWS).abs(), torch.float16, None, 0)
    yield "dora_merge", (w, a, b, drawn(ROWS).abs(), torch.bfloat16, 3, 7)
    for keep, seed in ((False, None), (True, None), (False, 3)):
        yield "nf4_merge", (codes, absmax, BLOCK, a, b, torch.bfloat16, keep, seed, 7)
        yield "nf4_encode_merge", (w, BLOCK, a, b, absmax if keep else None, seed, 7)
        yield "nf4_encode_merge", (w, BLOCK, a, b, absmax if keep else None, seed, 7, w.half())
    yield "nf4_decode_merge", (codes, absmax, BLOCK, a, b, torch.float16, torch.float16, 3, 7)
    state = drawn(4, 5, 7).abs()
    for axis in (0, 1):
        yield "adalora_importance", (*state, axis, 0.85, 0.9)
    yield "adalora_budget", (*drawn(4, 9), 4)
    yield "lora_adamw", (*drawn(4, 9).abs(), 4, 7, RATES)
    yield "lora_adamw_update", (*(x.clone() for x in drawn(4, 9).abs()), 4, 7, RATES)


SAMPLES = list(samples())


def test_every_kernel_is_an_operator():
    modules = _dora_ops, _merge_ops, _nf4_ops, _ops, _training_ops
    made = {name for module in modules for name in vars(module)}
    for name in plugins.names("kernels"):
        assert name in made
        assert hasattr(OPERATORS, name)


@pytest.mark.parametrize(
    ("name", "args"), SAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SAMPLES)]
)
def test_an_operator_keeps_torch_s_rules(name, args):
    torch.library.opcheck(getattr(OPERATORS, name).default, args)


def test_samples_are_of_all_operators_without_a_gradient():
    with_one = {*vars(_ops), *vars(_dora_ops)}
    found = {n for n in plugins.names("kernels") if n not in with_one}
    assert {name for name, _ in SAMPLES} == {*found, "lora_adamw_update"}


def compiled(function, *args):
    """What it gives in one graph of operators."""
    return torch.compile(function, backend="aot_eager", fullgraph=True)(*args)


def test_quantizing_twice_and_back_is_one_graph():
    def there_and_back(w):
        codes, absmax = nf4_quantize.run(w, BLOCK)
        q, nested, offset = double_quantize.run(absmax)
        scales = double_dequantize.run(q, nested, offset)
        return codes, nf4_dequantize.run(codes, scales, BLOCK, len(w), torch.bfloat16, TABLE)

    w = drawn(333).bfloat16()
    torch.testing.assert_close(compiled(there_and_back, w), there_and_back(w), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["lora_merge", "dora_merge", "nf4_merge", "nf4_decode_merge", "nf4_encode_merge"]
)
def test_a_merge_and_its_sums_are_one_graph(name):
    def merged(*args):
        *made, sums = getattr(OPERATORS, name)(*args)
        # three over all, or moments of each block
        return (*made, sums[0] / sums[1], sums.sum(dim=0))

    args = next(args for found, args in SAMPLES if found == name)
    torch.testing.assert_close(compiled(merged, *args), merged(*args), rtol=0, atol=0)


def test_importance_and_budget_are_one_graph():
    def allocate(e, w):
        *_, score = adalora_importance.run(w, w + 1, w.abs(), w.abs(), 1)
        return adalora_budget.run(e, score, score, score, 3)

    args = drawn(7), drawn(7, 20)
    torch.testing.assert_close(compiled(allocate, *args), allocate(*args), rtol=0, atol=0)


def test_a_step_in_place_is_one_graph_and_changes_its_arguments():
    def step(w, grad, m, v, number):
        lora_adamw.update(w, grad, m, v, 4, number, Rates(1e-2))
        return w + 1

    found = []
    for form in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        state = [x.clone() for x in drawn(4, 9).abs()]
        results = [form(*state, number) for number in (1, 2, 3)]
        found.append([*state, *results])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert not torch.equal(found[1][0], drawn(4, 9).abs()[0])


def test_a_step_that_autograd_would_need_undone_is_refused():
    w = torch.ones(3, requires_grad=True)
    y = (w * 1).exp()
    state = torch.zeros(2, 3)
    lora_adamw.update(y, torch.ones(3), *state, 1, 1, Rates(1e-2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_gradient_flows_through_what_is_no_layer():
    w = drawn(64).requires_grad_()
    codes, absmax = nf4_quantize.run(w, BLOCK)
    assert not absmax.requires_grad
    decoded = nf4_dequantize.run(codes, absmax.requires_grad_(), BLOCK, 64, torch.float32, TABLE)
    assert not decoded.requires_grad


@pytest.mark.parametrize("seed", [1 << 63, (1 << 64) + 5, -(1 << 63) - 1])
def test_a_seed_of_any_size_is_the_same_for_tensors_and_arrays(seed):
    w, (a, b) = drawn(ROWS, COLUMNS), factors()
    merged, *sums = lora_merge.run(w, a, b, torch.float16, seed)
    arrays = lora_merge.run(w.numpy(), a.numpy(), b.numpy(), np.dtype("float16"), seed)
    assert merged.numpy().tobytes() == arrays[0].tobytes()
    assert sums == list(arrays[1:])
