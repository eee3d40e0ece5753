"""`lorasurgery train` killed by SIGKILL, or out of room: with --resume it ends in the bytes of a run never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lorasurgery.errors import OutputError
from lorasurgery.training import state
from lorasurgery.training import train as training
from lorasurgery.training.options import Held
from tests.test_training_cli import surgery
from tests.training_case import TEXT, options, run, save_base

ROOT = Path(__file__).parents[1]
ONE = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FLAGS = ("--data", TEXT, "--batch", 2, "--length", 48, "--rank", 4, "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("killed") / "base")


def python(module: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.Popen(
        words, env=ONE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


OWN = {
    "lora": ("--dropout", 0.2, "--accumulate", 2),
    "adalora": ("--init-r", 5),
    # the snapshot is taken on one side of the stop, moments are on the disk
    "delta-lora": ("--lambda", 0.5, "--start", 1, "--save-base-delta", "--optimizer", "paged-adamw",
                   "--state-budget", "2KiB"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "moments"),
    [
        ("lora", ["half a state", "os.rename state.pt.part", "os.rename straight.partial"]),
        ("adalora", ["stepped", "half a state"]),
        ("delta-lora", ["stepped"]),
    ],
)
def test_killed_at_any_moment_it_is_resumed_to_the_same_bytes(base, method, moments, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text(TEXT.read_text()[:300])
    own = OWN[method]
    looked = ("--eval-data", held, "--eval-every", 2, "--save-every", 2)
    flags = (base, *FLAGS, "--method", method, *own, "--steps", 5, *looked)
    running = python("tests.killed_training", tmp_path, ",".join(moments), *flags)
    said, trouble = running.communicate()
    assert running.returncode == 0, said + trouble


def test_a_process_that_is_killed_from_outside_is_resumed_to_the_same_bytes(base, tmp_path):
    flags = (base, *FLAGS, "--steps", 60, "--save-every", 3, "-q")
    metrics = tmp_path / "out.partial" / "metrics.jsonl"
    running = python("lorasurgery", "train", *flags, "-o", tmp_path / "out")
    while running.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") > 4:
            running.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    assert running.wait() == -signal.SIGKILL, running.communicate()
    assert state.load(tmp_path / "out.partial" / training.STATE).step >= 3
    end = python("lorasurgery", "train", *flags, "-o", tmp_path / "out", "--resume")
    assert end.communicate() == ("", "")
    assert surgery("train", *flags, "-o", tmp_path / "straight").exit_code == 0
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "straight"))
    assert one.read_bytes() == two.read_bytes()


def test_a_full_disk_while_a_state_is_saved_keeps_the_last_one(base, tmp_path):
    saved = tmp_path / "out.partial" / training.STATE

    def fill(told, _steps):
        if told["step"] == 4:
            saved.with_name("state.pt.part").symlink_to("/dev/full")

    asked = replace(options(steps=6), held=Held(save_every=2))
    with pytest.raises(OutputError) as caught:
        run(base, tmp_path / "out", replace(asked, watch=fill))
    assert str(caught.value) == (
        f"{saved}: the state cannot be written (No space left on device). Make room, or name another "
        f"output. {tmp_path}/out.partial keeps the state after step 2."
    )
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    run(base, tmp_path / "out", asked, resume=True)
    run(base, tmp_path / "straight", asked)
    one, two = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "straight"))
    assert one.read_bytes() == two.read_bytes()
