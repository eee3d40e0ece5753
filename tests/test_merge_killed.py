"""A merge that is killed: what it keeps beside the tensors (undo file, residual adapter) survives as they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasurgery.checkpoint import JOURNAL, MANIFEST, SCRATCH
from lorasurgery.errors import OutputError, VerificationError
from lorasurgery.operations.merge import merge
from lorasurgery.operations.merging.options import MergeOptions
from lorasurgery.operations.quantize import QuantizeOptions, quantize
from lorasurgery.operations.unmerge import UnmergeOptions, unmerge
from lorasurgery.output import OutputOptions
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions
from tests import small
from tests.forked import count_steps, kill


def how(**output: object) -> RunOptions:
    return RunOptions(OutputOptions(**output), threads=1)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder; of a manifest all but the time it took, and where the undo file went."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    for name, content in found.items():
        if name.endswith(MANIFEST):
            manifest = json.loads(content)
            kept = {k: v for k, v in manifest.items() if k not in ("seconds", "plan", "settings")}
            found[name] = json.dumps(kept).encode()
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, the same in NF4, and an adapter."""
    home = tmp_path_factory.mktemp("made")
    small.base(home / "base")
    small.adapter(home / "adapter", size=20)
    quantize(home / "base", home / "nf4", QuantizeOptions(), how())
    return home


def merging(made: Path, home: Path, kind: str, **output: object) -> Callable[[], Report]:
    home.mkdir(exist_ok=True)
    undo = home / "u.undo"
    options = {
        "undo": MergeOptions(undo=undo),
        "residual": MergeOptions(policy="residual", rank=4, undo=undo),
    }[kind]
    base = made / ("base" if kind == "undo" else "nf4")
    adapter = str(made / "adapter")
    return lambda: merge(base, [adapter], home / "out", options, how(**output))


@pytest.mark.parametrize("kind", ["undo", "residual"])
def test_killed_near_the_end_all_of_it_comes_with_resume(
    tmp_path: Path, made: Path, kind: str
) -> None:
    merging(made, tmp_path / "want", kind)()
    want = tree(tmp_path / "want")
    assert not any(SCRATCH in name or JOURNAL in name for name in want)
    work = merging(made, tmp_path / "count-out", kind)
    steps = count_steps(work, tmp_path / "steps")
    at = tmp_path / "at-out"
    seen = set()
    # every second step of the end, and one in 60 of what comes before
    last = max(i for i, step in enumerate(steps) if step == "half a line")
    for step in (*range(0, last, 60), *range(last, len(steps), 2)):
        shutil.rmtree(at, ignore_errors=True)
        kill(step, merging(made, at, kind))
        found = tree(at)
        complete = (at / "out").exists()
        seen.add((complete, (at / "u.undo").exists()))
        if complete:
            kept = {n: b for n, b in found.items() if SCRATCH not in n and JOURNAL not in n}
            assert {n: b for n, b in kept.items() if n.startswith("out/")} == {
                n: b for n, b in want.items() if n.startswith("out/")
            }
        merging(made, at, kind, resume=True)()
        assert tree(at) == want
    # what comes last is that the undo file gets its name
    assert seen == {(False, False), (True, False)}


def test_an_undo_file_that_came_back_by_resume_brings_the_base_back(
    tmp_path: Path, made: Path
) -> None:
    steps = count_steps(merging(made, tmp_path / "count-out", "undo"), tmp_path / "steps")
    kill(len(steps) - 6, merging(made, tmp_path / "at-out", "undo"))
    merging(made, tmp_path / "at-out", "undo", resume=True)()
    options = UnmergeOptions(undo=tmp_path / "at-out" / "u.undo")
    merged, adapter = tmp_path / "at-out" / "out", [str(made / "adapter")]
    unmerge(merged, adapter, tmp_path / "back", options, how())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (made / "base" / name).read_bytes()


@pytest.mark.parametrize("old", [False, True])
def test_a_merge_that_fails_at_the_end_leaves_the_undo_file_of_the_old_one(
    tmp_path: Path, made: Path, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old:
        merging(made, tmp_path / "at", "undo")()
    before = tree(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OutputError("out: cannot be written (No space left on device). Make room.")

    monkeypatch.setattr("lorasurgery.output.put_in_place", full)
    with pytest.raises(
        OutputError, match=r"^out: cannot be written \(No space left on device\)\. Make"
    ):
        merging(made, tmp_path / "at", "undo", overwrite=old)()
    assert tree(tmp_path) == before


def test_a_merge_that_keeps_too_little_leaves_no_undo_file(tmp_path: Path, made: Path) -> None:
    options = MergeOptions(policy="rtn", min_retained=1.5, undo=tmp_path / "u.undo")
    with pytest.raises(VerificationError, match=r"^merge: retained signal is \d\.\d+ "):
        merge(made / "nf4", [str(made / "adapter")], tmp_path / "out", options, how())
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_an_undo_file_is_not_gone_on_with_by_one_that_wants_it(
    tmp_path: Path, made: Path
) -> None:
    """The finished edits left nothing to make it of."""
    out, adapter = tmp_path / "out", [str(made / "adapter")]
    steps = count_steps(
        lambda: merge(made / "base", adapter, tmp_path / "count-out", MergeOptions(), how()),
        tmp_path / "steps",
    )
    kill(len(steps) // 2, lambda: merge(made / "base", adapter, out, MergeOptions(), how()))
    with pytest.raises(OutputError) as error:
        merge(made / "base", adapter, out, MergeOptions(undo=tmp_path / "u.undo"), how(resume=True))
    assert str(error.value) == (
        f"{out}.partial: was begun by another command or with other inputs. Repeat that command, or "
        "pass --overwrite instead of --resume."
    )
