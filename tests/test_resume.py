"""Killed or interrupted at any step, what is there is the old, nothing, or all of it; resume does the rest."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from lorasurgery import place
from lorasurgery.checkpoint import JOURNAL
from lorasurgery.errors import OutputError
from lorasurgery.surgery import Report, run
from tests.forked import count_steps, kill
from tests.runs import NAMES, RESUME, SHARDED, left, make, options, plan_of, tree


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of a run that nothing disturbs, in shards."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan_of(source), out, options(max_shard=SHARDED))
    return tree(out)


def test_a_disk_that_fills_up_during_the_run_leaves_what_resume_goes_on_with(
    tmp_path: Path, source: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, []

    def filling(fd: int, data: memoryview, at: int) -> int:
        calls.append(at)
        if len(calls) == 100:
            raise OSError(28, "No space left on device")
        return pwrite(fd, data[: len(data) // 2 + 1], at)  # and short writes on the way

    monkeypatch.setattr(os, "pwrite", filling)
    how = options(resume=True, max_shard=SHARDED)
    with pytest.raises(OutputError) as error:
        run(plan_of(source), tmp_path / "out", how)
    message = str(error.value)
    assert message.endswith(
        " cannot be written (No space left on device). Make room, or name another output."
    )
    assert any(f": {name} " in message for name in NAMES)
    assert left(tmp_path) == ["out.partial"]
    run(plan_of(source), tmp_path / "out", how)
    assert tree(tmp_path / "out") == expected
    assert left(tmp_path) == ["out"]


# --- interrupted


SLOW = """
import sys, time
from dataclasses import replace
from pathlib import Path
sys.path[:0] = {path!r}
from tests.runs import options, plan_of
from lorasurgery.surgery import run

source, out, delay, resume = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]

def slow(edit):
    def apply(step):
        time.sleep(delay)
        return edit.apply(step)
    return replace(edit, apply=apply)

plan = plan_of(source)
plan = replace(plan, edits=tuple(map(slow, plan.edits)))
how = replace(options(2, resume=resume == "resume", max_shard=40_000), progress=lambda *a: print(a, flush=True))
print("begun", flush=True)
run(plan, out, how)
"""


def slow_run(source: Path, out: Path, edits: int, resume: str = "") -> subprocess.Popen[str]:
    """A run in a process of its own, of which so many edits have ended."""
    code = SLOW.format(path=[str(Path(__file__).parents[1])])
    process = subprocess.Popen(
        [sys.executable, "-c", code, source, out, "0.1", resume],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    for _ in range(edits + 1):
        process.stdout.readline()
    return process


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    process = slow_run(source, tmp_path / "x" / "out", 3)
    assert left(tmp_path / "x") == ["out.partial"]
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error.rstrip().endswith("KeyboardInterrupt")
    assert left(tmp_path) == []


def test_ctrl_c_with_resume_leaves_what_can_be_gone_on_with(
    tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    process = slow_run(source, tmp_path / "out", 4, "resume")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert left(tmp_path) == ["out.partial"]
    check_resumed(source, tmp_path / "out", expected, at_least=4)


@pytest.mark.parametrize("edits", [0, 1, 4, 8])
def test_a_killed_process_leaves_what_can_be_gone_on_with(
    tmp_path: Path, source: Path, expected: dict[str, bytes], edits: int
) -> None:
    process = slow_run(source, tmp_path / "out", edits)
    time.sleep(random.Random(edits).random() * 0.08)
    process.kill()
    process.communicate(timeout=60)
    assert "out" not in left(tmp_path)
    check_resumed(source, tmp_path / "out", expected, at_least=edits)


def check_resumed(
    source: Path, out: Path, expected: Mapping[str, bytes], at_least: int = 0
) -> None:
    """A resumed run does the rest, and only that, and gives what an undisturbed one gives."""
    journal = place.partial_of(out) / JOURNAL
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    finished = {json.loads(line)["edit"] for line in lines[1:]}
    assert len(finished) >= at_least
    applied: list[str] = []
    report = run(plan_of(source, applied), out, options(resume=True, max_shard=SHARDED))
    assert sorted(applied) == sorted({*NAMES, "ids", "mask"} - finished)
    assert [r.name for r in report.results] == NAMES
    assert tree(out) == expected
    assert left(out.parent) == ["out"]


def test_resume_of_a_finished_run_does_nothing_and_reports_the_same(
    tmp_path: Path, source: Path
) -> None:
    first = run(plan_of(source), tmp_path / "out", RESUME)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")}
    applied: list[str] = []
    second = run(plan_of(source, applied), tmp_path / "out", RESUME)
    assert applied == []
    assert second == replace(first, seconds=round(first.seconds, 3))
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("damage", ["a shard is gone", "a shard is cut", "another plan"])
def test_resume_does_not_take_a_damaged_or_another_output_for_finished(
    tmp_path: Path, source: Path, damage: str
) -> None:
    out = tmp_path / "out"
    run(plan_of(source), out, RESUME)
    plan = plan_of(source)
    if damage == "a shard is gone":
        (out / "model.safetensors").unlink()
    elif damage == "a shard is cut":
        os.truncate(out / "model.safetensors", 5000)
    else:
        plan = replace(plan, settings={"dtype": "other"})
    before = tree(out)
    with pytest.raises(OutputError) as error:
        run(plan, out, RESUME)
    assert str(error.value) == f"{out}: exists and is not empty. Pass --overwrite, or name another."
    assert tree(out) == before


@pytest.mark.parametrize("change", ["inputs", "settings", "operation", "shards", "edits"])
def test_resume_of_a_run_that_was_another_one_is_refused_and_keeps_it(
    tmp_path: Path, source: Path, change: str
) -> None:
    model, out = shutil.copytree(source, tmp_path / "model"), tmp_path / "out"
    stop = replace(RESUME, progress=interrupt_after(3))
    with pytest.raises(KeyboardInterrupt):
        run(plan_of(model), out, stop)
    how, plan = RESUME, plan_of(model)
    if change == "inputs":
        os.utime(model / "model.safetensors", (1, 1))
        plan = plan_of(model)
    elif change == "settings":
        plan = replace(plan, settings={"dtype": "F16"})
    elif change == "operation":
        plan = replace(plan, operation="other")
    elif change == "edits":
        plan = replace(plan, edits=plan.edits[:-1])
    else:
        how = options(resume=True, max_shard=SHARDED)
    before = tree(place.partial_of(out))
    with pytest.raises(OutputError) as error:
        run(plan, out, how)
    assert str(error.value) == (
        f"{out}.partial: was begun by another command or with other inputs. Repeat that command, or "
        "pass --overwrite instead of --resume."
    )
    assert tree(place.partial_of(out)) == before


def interrupt_after(edits: int) -> Callable[[int, int, str], None]:
    seen: list[str] = []

    def progress(_done: int, _all: int, name: str) -> None:
        seen.append(name)
        if len(seen) == edits:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_when_the_output_is_complete_takes_nothing_back(
    tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    """What was kept beside it is not discarded, and gets its name by --resume."""
    said: list[str] = []

    def publish() -> None:
        said.append("publish")
        if len(said) == 1:
            raise KeyboardInterrupt

    plan = plan_of(source, publish=publish, discard=lambda: said.append("discard"))
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", options(max_shard=SHARDED))
    assert tree(tmp_path / "out") == expected
    assert left(tmp_path) == ["out"]
    run(plan, tmp_path / "out", options(max_shard=SHARDED, resume=True))
    assert said == ["publish", "publish"]


# --- killed at every step


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "model", 6, NAMES[:3])


def ends(source: Path, out: Path, **output: object) -> Callable[[], Report]:
    how = options(tile=None, max_shard=1500, **output)
    return lambda: run(plan_of(source), out, how)


def test_killed_at_every_step_the_output_is_absent_or_whole_and_can_be_finished(
    tmp_path: Path, small: Path
) -> None:
    out = tmp_path / "at" / "out"
    ends(small, tmp_path / "want" / "out")()
    want = tree(tmp_path / "want" / "out")
    steps = count_steps(ends(small, tmp_path / "count" / "out"), tmp_path / "steps")
    assert steps.count("half written") > 6
    assert "os.rename" in steps
    absent = whole = 0
    for step in range(len(steps)):
        shutil.rmtree(tmp_path / "at", ignore_errors=True)
        kill(step, ends(small, out))
        if out.exists():
            whole += 1
            assert {n: b for n, b in tree(out).items() if n != JOURNAL} == want
        else:
            absent += 1
        ends(small, out, resume=True)()
        assert tree(out) == want
        assert left(out.parent) == ["out"]
    assert absent > 40
    assert whole > 0


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("then", ["resume", "overwrite", "nothing"])
def test_killed_at_every_step_of_a_replacement_the_old_output_or_the_new_one_is_there(
    tmp_path: Path, small: Path, exchange: bool, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the exchange, the next run of any kind brings back what was there."""
    if not exchange:
        monkeypatch.setattr(place, "_exchange", lambda _a, _b: False)
    out = tmp_path / "at" / "out"
    ends(small, tmp_path / "want" / "out")()
    new, old = tree(tmp_path / "want" / "out"), {"old.txt": b"old", "sub/b.txt": b"older"}

    def begin(folder: Path) -> Callable[[], Report]:
        shutil.rmtree(folder.parent, ignore_errors=True)
        for name, content in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return ends(small, folder, overwrite=True)

    steps = count_steps(begin(tmp_path / "count" / "out"), tmp_path / "steps")
    states = set()
    # what comes before the old output is touched is killed in the test above
    for step in range(steps.index("before the exchange") - 3, len(steps)):
        kill(step, begin(out))
        found = {n: b for n, b in tree(out).items() if n != JOURNAL} if out.exists() else None
        if found is None:
            assert not exchange
            assert tree(place.replaced_of(out)).items() >= old.items()
        assert found in (None, old, new)
        states.add("absent" if found is None else "old" if found == old else "new")
        if then == "nothing":
            refused_as_before(small, out)
        else:
            ends(small, out, overwrite=True, resume=then == "resume")()
            assert tree(out) == new
            assert left(out.parent) == ["out"]
    assert states == {"old", "new"} | (set() if exchange else {"absent"})


def refused_as_before(small: Path, out: Path) -> None:
    """A run that is told nothing finds the old output, or the new, and says so."""
    with pytest.raises(OutputError) as error:
        ends(small, out)()
    assert str(error.value) == f"{out}: exists and is not empty. Pass --overwrite, or name another."
    assert {"old.txt", "config.json"} & {f.name for f in out.iterdir()}
    assert not place.replaced_of(out).exists()
    assert not (out / JOURNAL).exists()


# --- two at once


def test_a_second_run_is_refused_while_the_first_goes_on_unharmed(
    tmp_path: Path, source: Path, expected: dict[str, bytes]
) -> None:
    said: list[str] = []

    def second(_done: int, _all: int, name: str) -> None:
        if name == NAMES[3]:
            for more in ({}, {"overwrite": True}, {"resume": True}):
                with pytest.raises(OutputError) as error:
                    run(plan_of(source), tmp_path / "out", options(max_shard=SHARDED, **more))
                said.append(str(error.value))

    run(plan_of(source), tmp_path / "out", replace(options(max_shard=SHARDED), progress=second))
    assert (
        said
        == [
            f"{tmp_path}/out.partial: another run is writing it. Wait for it, or name another output."
        ]
        * 3
    )
    assert tree(tmp_path / "out") == expected
