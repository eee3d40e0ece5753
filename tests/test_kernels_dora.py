"""DoRA: norms against PEFT's formula in float64, and gradients with the norm as a constant."""

import ml_dtypes
import numpy as np
import pytest
import torch

from lorasurgery.kernels import dora_norm, dora_output

# the interpreter computes in numpy, which warns of what IEEE defines
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_gradients_are_autograds_of_the_definition(kind):
    rng = torch.Generator().manual_seed(0)
    base, lora = (torch.randn(2, 5, 33, generator=rng)).to(kind)
    magnitude, norm = torch.rand(2, 33, generator=rng) + 0.5
    seen = torch.randn(5, 33, generator=rng).to(kind)
    found = []
    for compute in (dora_output.train, dora_output.reference):
        leaves = [x.clone().requires_grad_() for x in (base, lora, magnitude, norm)]
        y = compute(*leaves)
        y.backward(seen)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert found[0][4] is found[1][4] is None
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2])
    # another order of the same few operations
    torch.testing.assert_close(found[0][3], found[1][3], rtol=1e-5, atol=1e-6)


def test_the_definition_s_gradients_are_right():
    rng = torch.Generator().manual_seed(0)
    base, lora = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    magnitude, norm = torch.rand(2, 4, generator=rng, dtype=torch.float64) + 0.5

    def scaled(*args: torch.Tensor) -> torch.Tensor:
        return (args[0] + args[1]) * (args[2] / norm)

    leaves = [x.requires_grad_() for x in (base, lora, magnitude)]
    assert torch.autograd.gradcheck(scaled, leaves)
    # the definition is that formula, computed in float32
    y = dora_output.reference(*(x.float() for x in (base, lora, magnitude, norm)))
    torch.testing.assert_close(y, scaled(base, lora, magnitude).float())


def test_only_the_gradients_that_are_asked_for_are_computed():
    base = torch.ones(2, 3)
    magnitude = torch.ones(3, requires_grad=True)
    dora_output.train(base, base, magnitude, torch.full((3,), 2.0)).sum().backward()
    assert base.grad is None
    # Σ of (1 + 1) / 2 over two rows
    assert magnitude.grad.tolist() == [2.0, 2.0, 2.0]
