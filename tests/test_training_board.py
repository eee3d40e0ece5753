"""Where TensorBoard is installed, a run's metrics are its events; here a stand-in takes them down."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorasurgery.training import trainer
from lorasurgery.training.options import Held
from tests.training_case import TEXT, options, run, save_base
from tests.two_ranks import interrupted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("board") / "base")


class SummaryWriter:
    """Of torch.utils.tensorboard, as far as it is called: each call is a line of a file in the folder."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        Path(log_dir).mkdir(exist_ok=True)
        self._file = (Path(log_dir) / "calls").open("a")
        self._put("begin", purge_step)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self._put(tag, scalar_value, global_step)

    def close(self) -> None:
        self._put("close")
        self._file.close()

    def _put(self, *call: Any) -> None:
        self._file.write(json.dumps(call) + "\n")


@pytest.fixture
def installed(monkeypatch):
    made = ModuleType("torch.utils.tensorboard")
    made.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", made)


def calls(folder: Path) -> list[list[Any]]:
    lines = (folder / "tensorboard" / "calls").read_text().splitlines()
    return [json.loads(line) for line in lines]


def expected(folder: Path, steps: range) -> list[list[Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        [name.replace(".", "/"), value, row["step"]]
        for row in rows
        if row["step"] in steps
        for name, value in row.items()
        if name != "step"
    ]


@pytest.mark.usefixtures("installed")
def test_each_number_of_each_step_is_an_event(base, tmp_path):
    asked = replace(options("lora+"), held=Held((str(TEXT),), evaluate_every=2))
    run(base, tmp_path / "out", asked)
    found = calls(tmp_path / "out")
    assert found == [["begin", 1], *expected(tmp_path / "out", range(1, 4)), ["close"]]
    names = {call[0] for call in found[1:-1]}
    assert names == {"loss", "grad_norm", "tokens", "rate/A", "rate/B", "eval_loss", "seconds"}


@pytest.mark.usefixtures("installed")
def test_a_run_that_goes_on_takes_back_what_it_makes_once_more(base, tmp_path, monkeypatch):
    asked = replace(options(steps=4), held=Held(save_every=1))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", interrupted(2))
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "out", asked)
    run(base, tmp_path / "out", asked, resume=True)
    first, second = expected(tmp_path / "out", range(1, 3)), expected(tmp_path / "out", range(3, 5))
    assert calls(tmp_path / "out") == [
        ["begin", 1], *first, ["close"], ["begin", 3], *second, ["close"],
    ]  # fmt: skip


def test_without_tensorboard_nothing_is_written_and_nothing_said(base, tmp_path, monkeypatch):
    # torch's own module cannot be imported then
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(base, tmp_path / "out", options())
    assert not (tmp_path / "out" / "tensorboard").exists()
