"""DoRA: norms against PEFT's formula in float64, and gradients with the norm as a constant."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lorasurgery.kernels import dora_norm, dora_output

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
    pytest.mark.usefixtures("poisoned"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_norms_are_those_of_the_sum_in_float64(kind):
    rng = np.random.default_rng(0)
    w = (0.02 * rng.standard_normal((300, 2100))).astype(kind)
    a = rng.standard_normal((13, 2100), np.float32)
    b = np.float32(0.01) * rng.standard_normal((300, 13), np.float32)
    want = np.linalg.norm(w.astype(np.float64) + b.astype(np.float64) @ a, axis=1)
    # each element is off by 14 roundings of 2^-24 at most, and their errors differ in sign
    np.testing.assert_allclose(dora_norm.run(w, a, b), want, rtol=2.0**-22)


def test_a_change_that_cancels_the_weight_leaves_a_norm_that_is_right():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((1, 500), np.float32), rng.standard_normal((20, 1), np.float32)
    w = -(b @ a) * np.float32(1 + 1e-4)
    want = np.linalg.norm(w.astype(np.float64) + b.astype(np.float64) @ a, axis=1)
    # the product's rounding, 2^-24 of it, against what is left of it, 1e-4
    np.testing.assert_allclose(dora_norm.run(w, a, b), want, rtol=1e-4)
    wide = w.astype(np.float32)
    squares = (wide * wide).sum(1) + 2 * (wide * (b @ a)).sum(1) + ((b @ a) ** 2).sum(1)
    expanded = np.sqrt(np.maximum(squares, 0))
    # which the expansion in float32 misses by far
    assert np.median(np.abs(expanded / want - 1)) > 0.05


def test_columns_have_norms_too():
    rng = np.random.default_rng(2)
    w = rng.standard_normal((300, 700), np.float32)
    a, b = rng.standard_normal((7, 700), np.float32), rng.standard_normal((300, 7), np.float32)
    want = np.linalg.norm(w.astype(np.float64) + b.astype(np.float64) @ a, axis=0)
    np.testing.assert_allclose(dora_norm.run(w, a, b, 0), want, rtol=2.0**-22)


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_have_gradients_for_the_factors(axis):
    rng = torch.Generator().manual_seed(3)
    w, a, b = (torch.randn(s, generator=rng).double() for s in ((5, 7), (2, 7), (5, 2)))
    leaves = [x.requires_grad_() for x in (a, b)]
    assert torch.autograd.gradcheck(lambda a, b: dora_norm.reference(w, a, b, axis), leaves)
    found, seen = [], torch.randn((5, 7)[1 - axis], generator=rng)
    for form in (dora_norm.run, dora_norm.reference):
        single = [x.detach().float().requires_grad_() for x in leaves]
        form(w.float(), *single, axis).backward(seen)
        found.append([x.grad for x in single])
    # sums of seven terms in another order
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_gradients_of_norms_are_summed_over_parts_of_a_large_weight(monkeypatch):
    rng = torch.Generator().manual_seed(4)
    w, a, b = (torch.randn(s, generator=rng) for s in ((33, 20), (3, 20), (33, 3)))
    for axis in (0, 1):
        g, norm = torch.randn(2, (33, 20)[1 - axis], generator=rng).abs()
        args = g, w, a, b, norm, axis
        whole = dora_norm.gradients(*args)
        with monkeypatch.context() as patched:
            patched.setattr(dora_norm, "_TILE", 60)
            torch.testing.assert_close(dora_norm.gradients(*args), whole, rtol=1e-5, atol=1e-5)


def test_a_norm_of_zero_has_no_gradient():
    a, b = torch.zeros(2, 6, requires_grad=True), torch.zeros(4, 2, requires_grad=True)
    dora_norm.run(torch.zeros(4, 6), a, b).sum().backward()
    assert a.grad.tolist() == [[0] * 6] * 2
    assert b.grad.tolist() == [[0] * 2] * 4


def drawn(kind, rows=5):
    rng = torch.Generator().manual_seed(0)
    base, lora = (torch.randn(2, rows, 33, generator=rng)).to(kind)
    magnitude, norm = torch.rand(2, 33, generator=rng) + 0.5
    return [base, lora, magnitude, norm], torch.randn(rows, 33, generator=rng).to(kind)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alone", [False, True])
def test_gradients_are_autograds_of_the_definition(kind, alone):
    inputs, seen = drawn(kind)
    found = []
    for compute in (dora_output.run, dora_output.reference):
        leaves = [x.clone().requires_grad_() for x in inputs]
        given = [x if not alone or i != 1 else None for i, x in enumerate(leaves)]
        y = compute(*given)
        y.backward(seen)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][2] is None) == alone
    assert alone or torch.equal(found[0][2], found[1][2])
    # another order of the same few operations
    torch.testing.assert_close(found[0][3:], found[1][3:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 33])
def test_triton_s_gradients_are_the_cpu_s(kind, rows):
    (base, lora, magnitude, norm), seen = drawn(kind, rows)
    for other in (lora, None):
        want = dora_output.gradients(seen, base, other, magnitude, norm)
        moved = [None if x is None else x.to(DEVICE) for x in (seen, base, other, magnitude / norm)]
        gy, sums = dora_output._backward_launch(*moved)
        assert torch.equal(gy.cpu(), want[0])
        torch.testing.assert_close(sums.cpu() / norm, want[1], rtol=1e-6, atol=0)


def test_the_paper_s_gradient_takes_the_norm_as_a_constant():
    inputs, seen = drawn(torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs]
    dora_output.train(*leaves).backward(seen)
    assert leaves[3].grad is None
    torch.testing.assert_close(leaves[0].grad, seen * (inputs[2] / inputs[3]), rtol=0, atol=0)


def test_the_definition_s_gradients_are_right():
    inputs, _ = drawn(torch.float64, 3)
    leaves = [x.double()[..., :4].clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(dora_output.reference, leaves)
    assert torch.autograd.gradcheck(
        lambda x, m, n: dora_output.reference(x, None, m, n), (leaves[0], *leaves[2:])
    )


def test_norms_of_columns_scale_the_input():
    """Column by column V · m / norm times x is V times x · m / norm."""
    rng = torch.Generator().manual_seed(5)
    w, a, b = (torch.randn(s, generator=rng) for s in ((5, 7), (2, 7), (5, 2)))
    x, m = torch.randn(3, 7, generator=rng), torch.rand(7, generator=rng)
    v = (w + b @ a).double()
    want = x.double() @ (m * v / v.norm(dim=0)).T
    scaled = dora_output.run(x, None, m, dora_norm.run(w, a, b, 0))
    torch.testing.assert_close(
        (scaled @ w.T + scaled @ a.T @ b.T).double(), want, rtol=1e-5, atol=1e-5
    )


def test_operators_keep_torch_s_rules():
    from lorasurgery.kernels import _dora_ops

    inputs, _ = drawn(torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(_dora_ops.dora_output, tuple(leaves))
    torch.library.opcheck(_dora_ops.dora_output, (leaves[0], None, *leaves[2:]))
    rng = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=rng) for s in ((5, 7), (2, 7), (5, 2)))
    for axis in (0, 1):
        factors = a.clone().requires_grad_(), b.clone().requires_grad_()
        torch.library.opcheck(_dora_ops.dora_norm, (w, *factors, axis))


def test_compiled_graph_holds_norm_and_output_whole():
    rng = torch.Generator().manual_seed(0)
    w, a, b = (torch.randn(s, generator=rng) for s in ((33, 7), (2, 7), (33, 2)))
    (base, lora, magnitude, _), _ = drawn(torch.float32)

    def layer(a, b):
        return dora_output.run(base, lora, magnitude, dora_norm.run(w, a, b))

    found = []
    for form in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in (a, b)]
        y = form(*leaves)
        y.sum().backward()
        found.append([y, *(x.grad for x in leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_only_the_gradients_that_are_asked_for_are_computed():
    base = torch.ones(2, 3)
    magnitude = torch.ones(3, requires_grad=True)
    dora_output.train(base, base, magnitude, torch.full((3,), 2.0)).sum().backward()
    assert base.grad is None
    # Σ of (1 + 1) / 2 over two rows
    assert magnitude.grad.tolist() == [2.0, 2.0, 2.0]
