"""AdamW on factors against torch's own, LoRA+'s two rates, and which triplets a budget keeps."""

import numpy as np
import pytest
import torch

from lorasurgery.kernels import adalora_budget, adalora_importance, lora_adamw
from lorasurgery.kernels.lora_adamw import Rates


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_steps_are_those_of_torch_s_adamw_with_two_groups(ratio):
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(5000, generator=rng)
    a, b = start[:3000].clone().requires_grad_(), start[3000:].clone().requires_grad_()
    rates = Rates(1e-3, ratio, weight_decay=0.1)
    groups = [{"params": [a]}, {"params": [b], "lr": rates.lr * ratio}]
    theirs = torch.optim.AdamW(groups, lr=rates.lr, weight_decay=0.1, foreach=False)
    w, m, v = start, torch.zeros(5000), torch.zeros(5000)
    for step in range(1, 9):
        grad = torch.randn(5000, generator=rng)
        a.grad, b.grad = grad[:3000].clone(), grad[3000:].clone()
        theirs.step()
        w, m, v = lora_adamw.run(w, grad, m, v, 3000, step, rates)
        # torch fuses a product with a sum where the processor can: a rounding a step, of the weight
        # and of the move, whose size is about the rate
        want = torch.cat([a, b]).detach()
        bound = step * 2.0**-23 * want.abs() + step * 2.0**-20 * rates.lr * ratio
        assert ((w - want).abs() <= bound).all()


def test_after_one_step_a_weight_is_torch_s_to_one_last_place():
    rng = torch.Generator().manual_seed(1)
    w, grad = torch.randn(2, 100_000, generator=rng)
    p = w.clone().requires_grad_()
    p.grad = grad.clone()
    torch.optim.AdamW([p], lr=1e-3, foreach=False).step()
    zero = torch.zeros_like(w)
    got, *_ = lora_adamw.run(w, grad, zero, zero, len(w), 1, Rates(1e-3))
    steps = (got.view(torch.int32).long() - p.detach().view(torch.int32).long()).abs()
    # weights smaller than the move cancel against it
    assert steps[w.abs() > 2e-3].max() <= 1


def test_a_step_in_place_is_the_same_step():
    rng = torch.Generator().manual_seed(2)
    w, grad, m = torch.randn(3, 900, generator=rng)
    v = torch.rand(900, generator=rng)
    want = lora_adamw.run(w, grad, m, v, 400, 3, Rates(1e-2))
    for kind in (torch.Tensor, np.ndarray):
        state = [x.clone() if kind is torch.Tensor else x.numpy().copy() for x in (w, m, v)]
        g = grad if kind is torch.Tensor else grad.numpy()
        lora_adamw.update(state[0], g, state[1], state[2], 400, 3, Rates(1e-2))
        for got, expected in zip(state, want, strict=True):
            np.testing.assert_array_equal(np.asarray(got), expected.numpy())


def test_on_the_gpu_s_form_it_is_in_place_too():
    rng = torch.Generator().manual_seed(2)
    w, grad, m = torch.randn(3, 900, generator=rng)
    v = torch.rand(900, generator=rng)
    want = lora_adamw.run(w, grad, m, v, 400, 3, Rates(1e-2))
    lora_adamw._launch(w, grad, m, v, 400, 3, Rates(1e-2), out=(w, m, v))
    assert all(map(torch.equal, (w, m, v), want))


@pytest.mark.parametrize("data", [np.asarray, torch.tensor])
def test_a_budget_keeps_the_highest_scores_and_ties_go_together(data):
    scores = data([0.5, 0.1, 0.4, 0.1, 0.9])
    assert adalora_importance.kept(scores, 2).tolist() == [True, False, False, False, True]
    assert adalora_importance.kept(scores, 3).tolist() == [True, False, True, False, True]
    # the second smallest is as small as the smallest
    assert adalora_importance.kept(scores, 4).tolist() == [True, False, True, False, True]
    assert adalora_importance.kept(scores, 5).tolist() == [True] * 5
    assert adalora_importance.kept(scores, 0).tolist() == [False] * 5


def test_a_budget_masks_e_by_the_sum_of_three_scores():
    e = np.array([1, 2, 3, 4, 5], np.float32)
    of_e, of_a = (
        np.array([0.5, 0, 0, 0.1, 0], np.float32),
        np.array([0, 0.1, 0.2, 0, 0.4], np.float32),
    )
    of_b = np.array([0, 0, 0.2, 0, 0.5], np.float32)
    masked, keep = adalora_budget.run(e, of_e, of_a, of_b, 3)
    assert keep.tolist() == [True, False, True, False, True]
    assert masked.tolist() == [1, 0, 3, 0, 5]
    assert adalora_importance.kept(of_e + of_a + of_b, 3).tolist() == keep.tolist()
