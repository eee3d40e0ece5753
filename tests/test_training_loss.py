"""Cross-entropy some rows at a time, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from lorasurgery.training.cross_entropy import summed
from lorasurgery.training.examples import IGNORED


def drawn(rows: int, classes: int, dtype: torch.dtype = torch.float32):
    rng = torch.Generator().manual_seed(rows + classes)
    logits = 4 * torch.randn(rows, classes, generator=rng)
    labels = torch.randint(0, classes, (rows,), generator=rng)
    labels[::3] = IGNORED
    return logits.to(dtype).requires_grad_(), labels


def both(logits, labels, scale=1.0):
    found = []
    wide = lambda x, y: cross_entropy(x.double(), y, ignore_index=IGNORED, reduction="sum")  # noqa: E731
    for form in (summed, wide):
        logits.grad = None
        loss = form(logits, labels)
        (scale * loss).backward()
        found.append((loss.detach().float(), logits.grad))
    return found


# the last have more rows than are taken at once, and a row that is longer than that
@pytest.mark.parametrize(
    ("rows", "classes"), [(1, 2), (7, 5), (4, 1), (50, 49152), (2, (1 << 20) + 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_are_those_of_torch(rows, classes, dtype):
    (loss, gradient), (want, wanted) = both(*drawn(rows, classes, dtype), scale=0.01)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-5)
    assert gradient.dtype == dtype
    # a probability may be rounded to either of two neighbours
    near = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, wanted, rtol=near, atol=1e-7)


def test_rows_without_a_label_have_no_loss_and_no_gradient():
    logits, labels = drawn(9, 40)
    (loss, gradient), _ = both(logits, labels)
    assert (gradient[labels == IGNORED] == 0).all()
    assert (gradient[labels != IGNORED] != 0).any(1).all()
    alone = labels != IGNORED
    torch.testing.assert_close(summed(logits[alone], labels[alone]), loss)
    none = summed(logits, torch.full_like(labels, IGNORED))
    assert none.item() == 0.0


def test_classes_that_are_ruled_out_and_large_logits_make_no_nan():
    logits = torch.tensor([[1e4, -torch.inf, -1e4], [-torch.inf, 3e38, 0.0]], requires_grad=True)
    (loss, gradient), (want, wanted) = both(logits, torch.tensor([0, 1]))
    torch.testing.assert_close((loss, gradient), (want, wanted), rtol=0, atol=0)


def test_no_number_stays_no_number():
    logits, labels = drawn(4, 8)
    with torch.no_grad():
        logits[1, 3] = torch.nan
    assert summed(logits, labels).isnan()


def test_what_is_kept_are_the_logits_and_a_number_a_row():
    logits, labels = drawn(30, 100, torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        summed(logits, labels)
    places = {t.untyped_storage().data_ptr() for t in (logits, labels)}
    own = [t for t in kept if t.untyped_storage().data_ptr() not in places]
    assert [tuple(t.shape) for t in own] == [(30,)]
