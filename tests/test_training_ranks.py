"""`torchrun --nproc-per-node 2 -m lorasurgery train`: two processes do what one does, and each goes on with the other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasurgery.training import trainer
from lorasurgery.training.ranks import Ranks
from tests.test_training_cli import surgery
from tests.training_case import TEXT, kept, save_base
from tests.two_ranks import interrupted

ROOT = Path(__file__).parents[1]
SHORT = ("--length", 48, "--rank", 4, "--device", "cpu", "--steps", 3, "--batch", 2, "-q")
# what each is called, its method, and its flags
RUNS = {
    "lora": ("lora", "--accumulate", 3, "--weight-decay", 0.1),
    "lora+": ("lora+", "--ratio", 4),
    "dora": ("dora", "--lr", 1e-2, "--modules-to-save", "lm_head"),
    "adalora": ("adalora", "--init-r", 5, "--checkpointing"),
    "vera": ("vera", "--lr", 0.1),
    "lora-fa": ("lora-fa", "--fa-projection"),
    "lora-drop": ("lora-drop", "--keep", kept()),
    "delta-lora": ("delta-lora", "--lambda", 0.5, "--start", 0),
    "moral": ("moral", "--balance", 0.1, "--z-loss", 0.01, "--accumulate", 3),
    "qlora": ("lora", "--qlora", "--optimizer", "paged-adamw", "--state-budget", "2KiB"),
    "qlora-dora": ("dora", "--qlora", "--no-double-quant", "--checkpointing"),
}
HELD = ("--eval-every", 3, "--save-every", 1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Each method by one process and by two; runs that were begun by one and ended by two, and the other way."""
    home = tmp_path_factory.mktemp("ranks")
    base = save_base(home / "base")
    (home / "held.txt").write_text(TEXT.read_text()[:230])  # an odd number of examples

    def flags(output: str, *more: object) -> list[str]:
        looked = (*HELD, "--eval-data", home / "held.txt")
        words = (base, "--data", TEXT, *SHORT, *looked, "-o", home / output, *more)
        return [str(word) for word in words]

    methods = {name: ("--method", *own) for name, own in RUNS.items()}
    for name, own in methods.items():
        alone = surgery("train", *flags(f"{name}-one", *own))
        assert alone.exit_code == 0, alone.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "step", interrupted(2))
        begun = surgery("train", *flags("forth", *methods["lora"]))
        assert begun.exit_code == 130, begun.stderr
    two = [
        *(flags(f"{name}-two", *own) for name, own in methods.items()),
        ["2", *flags("back", *methods["lora"])],
        flags("forth", *methods["lora"], "--resume"),
        flags("odd", "--batch", "3"),
    ]
    said = torchrun(two)
    (home / "said").write_text(said.stdout)
    (home / "complained").write_text(said.stderr)
    ended = surgery("train", *flags("back", *methods["lora"], "--resume"))
    assert ended.exit_code == 0, said.stdout + said.stderr
    return home


def torchrun(runs: list[list[str]]) -> subprocess.CompletedProcess[str]:
    words = [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.two_ranks",
    ]
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", *words, json.dumps(runs)]
    return subprocess.run(call, env=alone, capture_output=True, text=True, check=False)


def told(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def alike(one: Path, two: Path) -> None:
    assert len(told(one)) == len(told(two)) == 3
    for a, b in zip(told(one), told(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    x, y = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, two))
    assert x.keys() == y.keys()
    for name, tensor in x.items():
        torch.testing.assert_close(tensor, y[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", list(RUNS))
def test_two_processes_train_what_one_does(home, method):
    alike(home / f"{method}-one", home / f"{method}-two")


@pytest.mark.parametrize("name", ["forth", "back"])
def test_a_state_is_gone_on_with_by_any_number_of_processes(home, name):
    alike(home / "lora-one", home / name)


def test_each_process_holds_half_of_what_is_frozen(home):
    said = (home / "said").read_text().splitlines()
    held = [json.loads(line) for line in said if line.startswith("[")]
    assert len(held) == len(RUNS) + 2
    # rows that two do not divide, and factors that are not trained, are whole somewhere
    assert all(0.45 < here / whole < 0.62 for (here, whole), _ in held)
    packed = [bytes_ for _, bytes_ in held if bytes_[1]]
    # of each of 14 layers a table of 16 values is whole, an offset, and the one scale of all scales
    alone = [14 * 4 * (16 + 1 + 1), 14 * 4 * 16]
    assert [here - table for (here, _), table in zip(packed, alone, strict=True)] == [
        (whole - table) / 2 for (_, whole), table in zip(packed, alone, strict=True)
    ]


def test_what_cannot_be_shared_is_refused_once(home):
    lines = (home / "complained").read_text().splitlines()
    back = home / "back.partial"
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: {back}: interrupted. Repeat the command with --resume to go on.",
        "error: --batch: 3 examples of a step cannot be shared alike by 2 processes. Make --batch times "
        "--accumulate a multiple of 2.",
    ]
    said = (home / "said").read_text().splitlines()
    assert [line for line in said if not line.startswith("[")] == ["11 130", "13 2"]
    assert not (home / "odd.partial").exists()


def test_every_example_is_seen_by_one_process():
    rows = list(range(12))
    shares = [Ranks(number, 3).mine(rows) for number in range(3)]
    assert sorted(row for share in shares for row in share) == rows
    assert {len(share) for share in shares} == {4}
