"""PagedAdamW: torch's AdamW bit for bit at every budget, no more of its state in memory than that, and so after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorasurgery.errors import OutputError, UsageError
from lorasurgery.training import state
from lorasurgery.training.optimizer import Settings
from lorasurgery.training.options import Held
from lorasurgery.training.paging import tiers
from lorasurgery.training.paging.adamw import PagedAdamW
from lorasurgery.training.paging.layout import PAGE, layout
from lorasurgery.training.paging.tiers import Mapped
from tests.training_case import begin, options, run, save_base, steps

# nothing, one element, odd ones, one that spans pages, and one that is stored turned
SHAPES = [(), (3,), (7, 33), (0, 4), (129, 40), (64, 64), (1,), (50, 90)]
TOTAL = 2 * 4 * sum(-(-torch.Size(s).numel() // 32) * 32 for s in SHAPES)
# a tenth of the least page that is wanted of a budget, a page, some, all but a byte, all, and no limit
BUDGETS = [256, 400, 4096, 3 * 4096, TOTAL // 2, TOTAL - 1, TOTAL, None]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [torch.randn(shape).to(dtype) for shape in SHAPES]
    made[-1] = made[-1].t().contiguous().t()
    return [nn.Parameter(t) for t in made]


def groups(held: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": held[:4], "lr": 1e-2, "weight_decay": 0.1},
        {"params": held[4:], "lr": 3e-3, "weight_decay": 0.0},
    ]


def go(
    optimizer: torch.optim.Optimizer, held: list[nn.Parameter], first: int, last: int
) -> list[Any]:
    """Steps first ... last: gradients follow from the step; some have none, and rates change."""
    told = []
    for step in range(first, last + 1):
        rng = torch.Generator().manual_seed(step)
        for i, p in enumerate(held):
            g = torch.randn(p.shape, generator=rng).to(p.dtype)
            p.grad = None if (i + step) % 5 == 0 else g
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        told.append(getattr(optimizer, "figures", dict)())
    return told


def equal(one: list[nn.Parameter], two: list[nn.Parameter]) -> bool:
    """Bit for bit, nan and signed zero too."""
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return all(
        torch.equal(p.detach().view(kinds[p.dtype]), q.detach().view(kinds[q.dtype]))
        for p, q in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
def test_weights_and_moments_are_torchs_bit_for_bit_whatever_the_budget(budget, dtype):
    theirs, ours = parameters(dtype), parameters(dtype)
    reference = torch.optim.AdamW(groups(theirs), betas=(0.9, 0.95), eps=1e-7)
    paged = PagedAdamW(groups(ours), (0.9, 0.95), 1e-7, budget)
    go(reference, theirs, 1, 12)
    go(paged, ours, 1, 12)
    assert equal(theirs, ours)
    one, two = reference.state_dict()["state"], paged.state_dict()["state"]
    assert one.keys() == two.keys()
    for i, of in one.items():
        assert of.keys() == two[i].keys()
        assert all(torch.equal(of[name], two[i][name]) for name in of)


class Watched(Mapped):
    """The file, with a record of what is moved."""

    def __init__(self, space: int, log: list[tuple[str, int]]) -> None:
        super().__init__(space)
        self.log = log

    def fetch(self, page: range, slot: torch.Tensor) -> None:
        self.log.append(("fetch", page.start))
        super().fetch(page, slot)

    def write_back(self, page: range, slot: torch.Tensor) -> None:
        self.log.append(("write", page.start))
        super().write_back(page, slot)


@pytest.mark.parametrize("budget", BUDGETS)
def test_no_more_state_is_in_memory_than_the_budget_and_nothing_moves_when_all_of_it_fits(budget):
    held, log = parameters(), []
    paged = PagedAdamW(groups(held), budget=budget, tier=lambda _, space: Watched(space, log))
    told = go(paged, held, 1, 10)
    assert paged.resident <= (TOTAL if budget is None else budget)
    if budget is None or budget >= TOTAL:
        assert log == []
        assert told == [{"pages_fetched": 0, "pages_written": 0}] * 10
        return
    counted = {"pages_fetched": "fetch", "pages_written": "write"}
    for name, kind in counted.items():
        assert sum(figures[name] for figures in told) == sum(what == kind for what, _ in log)
    assert log


def test_a_step_moves_what_does_not_fit_and_no_page_twice():
    held = parameters()
    paged = PagedAdamW(groups(held), budget=TOTAL // 2)
    pages, slots = paged.layout.pages, paged.layout.slots
    for p in held:
        p.grad = torch.ones_like(p)
    moved = []
    for _ in range(6):
        paged.step()
        moved.append(paged.figures())
    # nothing is there to be fetched at first; then each way begins with what the last one ended with
    assert moved[0] == {"pages_fetched": 0, "pages_written": pages - slots}
    assert moved[1:] == [{"pages_fetched": pages - slots, "pages_written": pages - slots}] * 5


def test_the_next_page_is_fetched_before_the_current_one_is_computed():
    log: list[tuple[str, int]] = []
    held = parameters()
    paged = PagedAdamW(groups(held), budget=3 * 4096, tier=lambda _, space: Watched(space, log))
    half = paged.layout.half
    update = paged._update

    def watched(segment: Any, flat: Any, page: Any) -> None:
        log.append(("compute", paged.layout.places[segment.parameter] + segment.start))
        update(segment, flat, page)

    paged._update = watched  # type: ignore[method-assign]
    for p in held:
        p.grad = torch.ones_like(p)
    paged.step()
    paged.step()
    del log[: log.index(("fetch", max(at for what, at in log if what == "fetch")))]
    pages = [(what, at // half) for what, at in log if what != "write"]
    fetched = [page for what, page in pages if what == "fetch"]
    for before, page in pairwise(fetched):
        # the second step goes down: page is fetched, and the one above it is computed after that
        assert page == before - 1
        assert pages.index(("fetch", page)) < pages.index(("compute", page + 1))


def test_what_is_written_back_is_what_was_changed_alone():
    held, log = parameters(), []
    paged = PagedAdamW(groups(held), budget=4096, tier=lambda _, space: Watched(space, log))
    go(paged, held, 1, 2)
    paged.state_dict()
    log.clear()
    for p in held:
        p.grad = None
    held[4].grad = torch.ones_like(held[4])
    paged.step()
    places, half = paged.layout.places, paged.layout.half
    touched = set(range(places[4] // half, -(-places[5] // half)))
    assert {at // half for what, at in log if what == "write"} <= touched
    assert {at // half for what, at in log if what == "fetch"} <= touched


@pytest.mark.parametrize("budget", BUDGETS)
def test_saved_and_loaded_it_goes_on_as_if_never_stopped_and_as_paged(budget, tmp_path):
    straight, held = parameters(), parameters()
    whole = PagedAdamW(groups(straight), budget=budget)
    told = go(whole, straight, 1, 4)
    whole.state_dict()
    told += go(whole, straight, 5, 9)
    first = PagedAdamW(groups(held), budget=budget)
    again = go(first, held, 1, 4)
    torch.save(first.state_dict(), tmp_path / "state")
    del first
    second = PagedAdamW(groups(held), budget=budget)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    again += go(second, held, 5, 9)
    assert equal(straight, held)
    assert again == told
    assert second.resident == whole.resident


def test_state_goes_between_budgets_and_to_torch_and_back():
    held, reference = parameters(), parameters()
    theirs = torch.optim.AdamW(groups(reference))
    go(theirs, reference, 1, 9)
    optimizer: torch.optim.Optimizer = PagedAdamW(groups(held), budget=4096)
    go(optimizer, held, 1, 2)
    for first, budget in ((3, None), (5, 256), (7, 12_000)):
        taken = optimizer.state_dict()
        optimizer = PagedAdamW(groups(held), budget=budget)
        optimizer.load_state_dict(taken)
        go(optimizer, held, first, first + 1)
    plain = torch.optim.AdamW(groups(held))
    plain.load_state_dict(optimizer.state_dict())
    back = PagedAdamW(groups(held), budget=4096)
    back.load_state_dict(plain.state_dict())
    go(back, held, 9, 9)
    assert equal(reference, held)


RESIDENT = """
import sys
from pathlib import Path

import torch

from lorasurgery.training.paging.adamw import PagedAdamW


def kib(name):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name))


p = torch.nn.Parameter(torch.zeros(8_000_000))
p.grad = torch.ones_like(p)
optimizer = PagedAdamW([{"params": [p]}], budget=eval(sys.argv[1]))
optimizer.step()
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
for _ in range(3):
    optimizer.step()
    optimizer.state_dict()
print(before, kib("VmHWM"))
"""


def resident(budget: str) -> list[int]:
    """MiB of the whole process after a step of 61 MiB of state, and the most in three more."""
    call = [sys.executable, "-c", RESIDENT, budget]
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        call, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True, check=True
    )
    return [int(word) >> 10 for word in done.stdout.split()]


def test_the_process_is_as_small_as_the_budget_says_and_stays_so():
    (whole, _), (small, most) = resident("None"), resident("4 << 20")
    # what is in the file is not in memory, also after it was written and read; 12 MiB for what torch itself takes
    assert small < whole - 61 + 4 + 12
    assert most < small + 12


def test_pages_are_whole_alignments_and_hold_every_element_once():
    for budget in (256, 1000, 5000, 10**9, None):
        made = layout([4, 0, 12, 924, 130_000], budget)
        seen = [
            (s.parameter, byte)
            for page in made.segments()
            for s in page
            for byte in range(s.start, s.stop, 4)
        ]
        assert len(seen) == len(set(seen)) == (4 + 12 + 924 + 130_000) // 4
        assert made.half % 128 == 0
        assert all(
            s.at % 4 == 0 and s.at + s.stop - s.start <= made.half
            for p in made.segments()
            for s in p
        )
    assert layout([10**9], 8 << 20).half == PAGE // 2


def test_a_budget_without_a_page_and_one_for_another_optimizer_are_refused(tmp_path):
    with pytest.raises(UsageError) as caught:
        PagedAdamW(groups(parameters()), budget=255)
    assert str(caught.value) == (
        "--state-budget: 255 bytes hold no page, the least of which has 256. Allow more."
    )
    base = save_base(tmp_path / "base")
    with pytest.raises(UsageError) as caught:
        begin(base, options(settings=Settings(budget=1 << 20)))
    assert str(caught.value) == (
        "--state-budget: means nothing to --optimizer adamw, whose state is in memory as a whole. Take paged-adamw, "
        "or leave it out."
    )


def test_a_disk_without_room_is_told_before_anything_is_trained(monkeypatch):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tiers.os, "posix_fallocate", full)
    monkeypatch.setattr(tiers.tempfile, "gettempdir", lambda: "/tmp")
    with pytest.raises(OutputError) as caught:
        Mapped(4096)
    assert str(caught.value) == (
        "/tmp: has no room for 8192 bytes of optimizer state (No space left on device). Set TMPDIR to where there is, "
        "or raise --state-budget."
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("paging") / "base")


def test_a_run_with_paged_state_writes_the_bytes_of_one_without_and_tells_what_moved(
    base, tmp_path
):
    pace = {"steps": 4, "decay": 0.1}
    run(base, tmp_path / "plain", options(**pace))
    expected = (tmp_path / "plain" / "adapter_model.safetensors").read_bytes()
    moved = {}
    for budget in (2048, 8192, None):
        folder = tmp_path / str(budget)
        run(
            base, folder, options(**pace, optimizer="paged-adamw", settings=Settings(budget=budget))
        )
        assert (folder / "adapter_model.safetensors").read_bytes() == expected
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        moved[budget] = [row["pages_fetched"] for row in rows]
    assert moved[None] == [0] * 4
    assert moved[2048][1] > 0
    # 3712 parameters of 8 bytes; pages of a quarter of the budget, 4 of which stay
    assert moved[2048][1:] == [58 - 4] * 3


def test_a_paged_run_is_resumed_to_the_same_bits(base, tmp_path):
    pace = {"steps": 6, "optimizer": "paged-adamw", "settings": Settings(budget=4096)}
    asked = replace(options(**pace), held=Held(save_every=3))
    straight = begin(base, asked)
    expected = steps(straight, 3)
    state.save(straight.trainer.capture(), tmp_path / "state.pt")
    expected += steps(straight, 3)
    second = begin(base, asked)
    second.trainer.restore(state.load(tmp_path / "state.pt"))
    assert steps(second, 3) == expected[3:]
    one, two = (dict(p.trainer.parts.model.named_parameters()) for p in (straight, second))
    assert all(torch.equal(one[n], two[n]) for n in one)
