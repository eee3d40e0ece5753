"""The engine: killed, interrupted or failing at any step, what is there is the old, nothing, or all of it."""

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

import blake3
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorasurgery import output as output_module
from lorasurgery import place, surgery
from lorasurgery.checkpoint import JOURNAL, MANIFEST, Checkpoint, open_checkpoint
from lorasurgery.edit import Edit, Metrics, Step, copy_edit, tile_rows
from lorasurgery.errors import FormatError, OutputError, ShapeError, VerificationError
from lorasurgery.formats._writer import lay_out
from lorasurgery.operations.convert_checkpoint import cast_edit
from lorasurgery.output import Output, OutputOptions
from lorasurgery.surgery import Plan, Report, RunOptions, rehearse, run
from lorasurgery.tensors import TensorInfo
from tests.forked import count_steps, kill, with_files_up_to

NAMES = [f"layer.{i}.weight" for i in range(8)]


def make(folder: Path, rows: int = 40, names: list[str] = NAMES) -> Path:
    """A checkpoint of float32 matrices, all different, with two that are copied."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal((rows + i, 64), np.float32) for i, n in enumerate(names)}
    tensors["ids"] = np.arange(100, dtype=np.int64)
    tensors["mask"] = np.ones((3, 3), np.uint8)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"dtype": "float32"}')
    return folder


def plan_of(source: Path, applied: list[str] | None = None, **changes: object) -> Plan:
    """float32 to bfloat16; `applied` notes each edit that is really carried out."""
    checkpoint = open_checkpoint(source)
    edits = []
    for name in checkpoint:
        edit = cast_edit(checkpoint, name, "BF16")
        edits.append(edit if applied is None else replace(edit, apply=noting(edit, applied)))
    plan = Plan(
        "test", {"base": source}, {"dtype": "BF16"}, tuple(edits),
        {"config.json": source / "config.json", "sub/note.txt": b"note"},
        lambda results: {"tensors": len(results)},
    )  # fmt: skip
    return replace(plan, **changes)


def noting(edit: Edit, applied: list[str]) -> Callable[[Step], Metrics]:
    def apply(step: Step) -> Metrics:
        applied.append(edit.name)
        return edit.apply(step)

    return apply


def options(threads: int = 1, tile: int | None = 1 << 10, **output: object) -> RunOptions:
    return RunOptions(
        OutputOptions(**output), max_memory=tile and 8 * threads * tile, threads=threads
    )


RESUME, SHARDED = options(resume=True), 40_000


def tree(folder: Path) -> dict[str, bytes]:
    """All files of a directory with their bytes; of the manifest all but the time it took."""
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        manifest.pop("seconds")
        found[MANIFEST] = json.dumps(manifest).encode()
    return found


def b3(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The output of a run that nothing disturbs, in shards."""
    out = tmp_path_factory.mktemp("expected") / "out"
    run(plan_of(source), out, options(max_shard=SHARDED))
    return tree(out)


# --- what a run gives


@pytest.mark.parametrize("threads", [1, 3])
def test_the_tensors_are_those_that_numpy_makes(tmp_path: Path, source: Path, threads: int) -> None:
    run(plan_of(source), tmp_path / "out", options(threads, max_shard=SHARDED))
    was = safetensors.numpy.load_file(source / "model.safetensors")
    index = json.loads((tmp_path / "out" / output_module.INDEX).read_bytes())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        (read,) = (
            t
            for n, t in safetensors.deserialize((tmp_path / "out" / file).read_bytes())
            if n == name
        )
        want = was[name].astype(ml_dtypes.bfloat16) if name in NAMES else was[name]
        assert bytes(read["data"]) == want.tobytes()
        assert tuple(read["shape"]) == want.shape
    assert (tmp_path / "out" / "config.json").read_text() == '{"dtype": "float32"}'
    assert (tmp_path / "out" / "sub" / "note.txt").read_text() == "note"


def test_the_manifest_says_what_was_done_with_true_hashes(tmp_path: Path, source: Path) -> None:
    report = run(plan_of(source, notes=("a note",)), tmp_path / "out", options())
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    was = safetensors.numpy.load_file(source / "model.safetensors")
    read = {name: b3(was[name].tobytes()) for name in NAMES}
    lines = "\n".join(f"{name} {read[name]}" for name in sorted(NAMES))
    assert manifest["base_fingerprint"] == b3(lines.encode())
    assert list(manifest["tensors"]) == NAMES
    for name in NAMES:
        cast = was[name].astype(ml_dtypes.bfloat16)
        tensor = manifest["tensors"][name]
        assert tensor["read"] == {name: read[name]}
        assert tensor["written"] == {name: b3(cast.tobytes())}
        error = np.linalg.norm(cast.astype(np.float64) - was[name]) / np.linalg.norm(was[name])
        # sums in float32
        assert tensor["metrics"]["relative_error"] == pytest.approx(error, rel=1e-5)
    assert manifest["operation"] == "test"
    assert manifest["settings"] == {"dtype": "BF16"}
    assert manifest["inputs"] == {"base": str(source)}
    assert manifest["total"] == {"tensors": 8}
    assert manifest["notes"] == ["a note"]
    assert manifest["seconds"] == round(report.seconds, 3)


def test_settings_of_any_kind_can_be_said_in_the_manifest(tmp_path: Path, source: Path) -> None:
    settings = {"adapters": [Path("a"), Path("b")], "rank": 4}
    run(plan_of(source, settings=settings), tmp_path / "out", options())
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    assert manifest["settings"] == {"adapters": ["a", "b"], "rank": 4}


def test_a_rehearsal_gives_the_numbers_of_the_run_and_writes_nothing(
    tmp_path: Path, source: Path
) -> None:
    rehearsed = rehearse(plan_of(source), options())
    report = run(plan_of(source), tmp_path / "out", options())
    assert rehearsed.results == report.results
    assert rehearsed.total == report.total


def test_progress_ends_at_all_bytes_and_names_each_edit_once(tmp_path: Path, source: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    run(plan_of(source), tmp_path / "out", replace(options(2), progress=lambda *a: seen.append(a)))
    assert sorted(name for _, _, name in seen) == sorted([*NAMES, "ids", "mask"])
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1]


def test_metrics_do_not_depend_on_how_many_threads_there_are(tmp_path: Path, source: Path) -> None:
    one = run(plan_of(source), tmp_path / "1", options(1))
    four = run(plan_of(source), tmp_path / "4", options(4, tile=1 << 10))
    assert one.results == four.results


# --- memory


@pytest.mark.parametrize(
    ("shape", "multiple", "tile", "rows"),
    [
        ((1000, 64), 1, 1 << 12, 16),
        ((1000, 64), 64, 1 << 12, 16),
        ((1000, 48), 64, 1 << 12, 20),  # 4 rows of 48 are 3 blocks of 64
        ((1000, 7), 64, 1 << 10, 64),  # 64 rows of 7 are whole blocks; fewer are not
        ((4, 1 << 20), 64, 1 << 12, 1),
        ((0, 5), 1, 1 << 12, 1 << 12),
        ((), 1, 1 << 12, 1),
    ],
)
def test_tiles_are_whole_blocks_of_about_the_size_that_is_asked(
    shape: tuple[int, ...], multiple: int, tile: int, rows: int
) -> None:
    assert tile_rows(TensorInfo("w", "F32", shape), multiple, tile) == rows


@pytest.mark.parametrize(("threads", "memory"), [(1, 1 << 20), (4, 4 << 20), (2, 1 << 30)])
def test_max_memory_bounds_what_each_worker_holds(
    tmp_path: Path, source: Path, threads: int, memory: int
) -> None:
    sizes: list[int] = []

    def apply(step: Step) -> Metrics:
        checkpoint = open_checkpoint(source)
        for _, tile in step.tiles(checkpoint, "wide"):
            sizes.append(tile.nbytes)
            step.append("wide", tile)
        return {"x": 1}

    source = tmp_path / "wide"
    source.mkdir()
    w = np.zeros((4096, 512), np.float32)
    safetensors.numpy.save_file({"wide": w}, source / "model.safetensors")
    info = open_checkpoint(source).info("wide")
    plan = Plan("test", {"base": source}, {}, (Edit("wide", (info,), apply),), {}, lambda _: {})
    run(plan, tmp_path / "out", RunOptions(max_memory=memory, threads=threads))
    assert sum(sizes) == w.nbytes
    assert max(sizes) <= max(64 << 10, min(surgery.TILE_BYTES, memory // (8 * threads)))


MEASURE = """
import resource, sys
from pathlib import Path
from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.operations.convert_checkpoint import cast_edit
from lorasurgery.surgery import Plan, RunOptions, run

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

source, out = map(Path, sys.argv[1:])
checkpoint = open_checkpoint(source)
edits = tuple(cast_edit(checkpoint, name, "BF16") for name in checkpoint)
before = peak()
run(Plan("test", {"base": source}, {}, edits, {}, lambda _: {}), out, RunOptions(threads=2))
print(peak() - before)
"""


def test_the_peak_of_memory_is_far_below_the_checkpoint(tmp_path: Path) -> None:
    """Two matrices of 130 MB cast, and one of 40 MB copied; mapped pages count as memory too."""
    tensors = {"a": ("F32", (500, 65536)), "b": ("F32", (500, 65536)), "c": ("I32", (1000, 10000))}
    (shard,) = lay_out([TensorInfo(n, d, s) for n, (d, s) in tensors.items()], 1 << 40, {})
    source = tmp_path / "model"
    source.mkdir()
    with (source / shard.file).open("wb") as file:  # sparse
        file.write(shard.head)
        file.truncate(shard.size)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, source, tmp_path / "out"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shard.size > 300_000_000
    assert int(done.stdout) << 10 < 80 << 20  # kilobytes; two windows of 16 MiB, tiles, threads


# --- the plan is refused


def test_a_run_checks_where_it_writes_before_it_reads(tmp_path: Path, source: Path) -> None:
    applied: list[str] = []
    model = shutil.copytree(source, tmp_path / "model")
    for out in (model, model / "sub", tmp_path):
        with pytest.raises(
            OutputError, match=r"^\S+: (is or holds|lies inside) the input \S+\. Name"
        ):
            run(plan_of(model, applied), out, options(overwrite=True))
    assert applied == []
    assert tree(model) == tree(source)


def test_side_files_are_counted_in_what_the_disk_must_hold(tmp_path: Path, source: Path) -> None:
    big = tmp_path / "big.json"
    with big.open("wb") as file:
        file.truncate(1 << 42)  # sparse
    with pytest.raises(OutputError) as error:
        run(plan_of(source, files={"big.json": big}), tmp_path / "out", options())
    assert str(error.value).startswith(f"{tmp_path / 'out'}: needs {(1 << 22) + 16} MiB, but ")
    assert [f.name for f in tmp_path.iterdir()] == ["big.json"]


# --- failing


def left(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an old output"])
def test_an_edit_that_fails_leaves_what_was_there(
    tmp_path: Path, source: Path, threads: int, old: bool
) -> None:
    out = tmp_path / "out"
    if old:
        run(plan_of(source), out, options())
    before = tree(out)

    def fail(step: Step) -> Metrics:
        step.append(NAMES[5], np.zeros(10, ml_dtypes.bfloat16))
        raise ShapeError("layer.5: is bad. Mend it.")

    plan = plan_of(source)
    edits = tuple(replace(e, apply=fail) if e.name == NAMES[5] else e for e in plan.edits)
    with pytest.raises(ShapeError, match=r"^layer\.5: is bad\. Mend it\.$"):
        run(replace(plan, edits=edits), out, options(threads, overwrite=old))
    assert tree(out) == before
    assert left(tmp_path) == (["out"] if old else [])


@pytest.mark.parametrize("old", [False, True], ids=["nothing there", "an old output"])
@pytest.mark.parametrize("where", ["check", "finish"])
def test_a_check_that_fails_at_the_end_leaves_what_was_there(
    tmp_path: Path, source: Path, old: bool, where: str
) -> None:
    out = tmp_path / "out"
    if old:
        run(plan_of(source), out, options())
    before = tree(out)

    def fail(report: Report, *_: Path) -> None:
        assert len(report.results) == 8
        raise VerificationError("retained 0.02 of the change. Choose another policy.")

    with pytest.raises(VerificationError, match=r"^retained 0\.02 of the change\."):
        run(plan_of(source, **{where: fail}), out, options(overwrite=old))
    assert tree(out) == before
    assert left(tmp_path) == (["out"] if old else [])


def test_a_bug_in_an_edit_is_not_dressed_up_and_leaves_nothing(
    tmp_path: Path, source: Path
) -> None:
    def bug(_: Step) -> Metrics:
        raise ZeroDivisionError

    plan = plan_of(source)
    with pytest.raises(ZeroDivisionError):
        run(
            replace(plan, edits=(*plan.edits[1:], replace(plan.edits[0], apply=bug))),
            tmp_path / "out", options(),
        )  # fmt: skip
    assert left(tmp_path) == []


@pytest.mark.parametrize(("rows", "nbytes"), [(39, 39 * 64 * 2), (41, 41 * 64 * 2)])
def test_an_edit_that_writes_too_little_or_too_much_is_a_bug_that_is_seen(
    tmp_path: Path, source: Path, rows: int, nbytes: int
) -> None:
    target = TensorInfo("w", "BF16", (40, 64))

    def apply(step: Step) -> Metrics:
        step.append("w", np.zeros((rows, 64), ml_dtypes.bfloat16))
        return {"x": 1}

    plan = Plan("test", {"base": source}, {}, (Edit("w", (target,), apply),), {}, lambda _: {})
    with pytest.raises(ShapeError) as error:
        run(plan, tmp_path / "out", options())
    assert str(error.value) == f"w  BF16 [40, 64]: {nbytes} bytes are written. This is a bug."
    assert left(tmp_path) == []


def test_an_input_that_cannot_be_read_in_a_thread_is_named_with_its_tensor(
    tmp_path: Path, source: Path
) -> None:
    def gone(_: Step) -> Metrics:
        raise PermissionError(13, "Permission denied", "/data/shard-3.bin")

    plan = plan_of(source)
    edits = tuple(replace(e, apply=gone) if e.name == NAMES[2] else e for e in plan.edits)
    with pytest.raises(FormatError) as error:
        run(replace(plan, edits=edits), tmp_path / "out", options(3))
    assert str(error.value) == (
        f"/data/shard-3.bin: cannot be read for {NAMES[2]} (Permission denied). Check the file."
    )
    assert left(tmp_path) == []


def test_a_disk_that_is_full_for_what_is_kept_beside_the_tensors_is_one_line(
    tmp_path: Path, source: Path
) -> None:
    def apply(step: Step) -> Metrics:
        assert step.scratch
        (step.scratch / "kept").symlink_to("/dev/full")
        with (step.scratch / "kept").open("wb") as file:
            file.write(b"x" * 100_000)
        return {}

    plan = plan_of(source)
    edits = tuple(replace(e, apply=apply) if e.name == NAMES[2] else e for e in plan.edits)
    with pytest.raises(OutputError) as error:
        run(replace(plan, edits=edits), tmp_path / "out", options())
    assert str(error.value) == (
        f"{NAMES[2]}: what is kept of it for the end cannot be written (No space left on device). "
        "Make room, or name another output."
    )
    assert left(tmp_path) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_an_input_that_is_cut_while_it_is_read_is_one_line_and_no_crash(
    tmp_path: Path, source: Path, threads: int
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    plan = plan_of(model)
    os.truncate(model / "model.safetensors", 4096)
    with pytest.raises(FormatError) as error:
        run(plan, tmp_path / "out", options(threads))
    message = str(error.value)
    assert message.startswith(f"{model}/model.safetensors: ")
    assert any(name in message for name in (*NAMES, "ids", "mask"))
    assert "\n" not in message
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("how", ["written to", "replaced", "removed", "joined by another"])
def test_an_input_that_changes_during_the_run_is_seen(
    tmp_path: Path, source: Path, how: str
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    file = model / "model.safetensors"

    def meddle(_done: int, _all: int, name: str) -> None:
        if name != NAMES[3]:
            return
        if how == "written to":
            with file.open("r+b") as handle:
                handle.seek(-1, os.SEEK_END)
                handle.write(b"\x07")
        elif how == "replaced":
            shutil.copy(file, tmp_path / "copy")
            (tmp_path / "copy").replace(file)
        elif how == "removed":
            (model / "config.json").unlink()
        else:
            shutil.copy(file, model / "another.safetensors")

    with pytest.raises(FormatError) as error:
        run(plan_of(model, files={}), tmp_path / "out", replace(options(), progress=meddle))
    changed = {"removed": "config.json", "joined by another": "another.safetensors"}
    assert str(error.value) == (
        f"{model / changed.get(how, file.name)}: changed while it was read. "
        "Leave it alone, and begin again."
    )
    assert left(tmp_path) == ["model"]


def test_a_log_that_is_written_beside_the_weights_disturbs_nothing(
    tmp_path: Path, source: Path
) -> None:
    model = shutil.copytree(source, tmp_path / "model")
    log = replace(options(), progress=lambda *_: (model / "log.txt").write_text(str(time.time())))
    run(plan_of(model), tmp_path / "out", log)


def test_a_file_that_may_not_grow_is_one_line_and_leaves_nothing(
    tmp_path: Path, source: Path
) -> None:
    """A real limit of the system, met when the room is reserved."""
    said = with_files_up_to(10_000, lambda: run(plan_of(source), tmp_path / "out", options()))
    assert said == (
        f"{tmp_path}/out.partial/model.safetensors: the file cannot be written (File too large). "
        "Check the disk, or name another output."
    )
    assert left(tmp_path) == []


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
from test_surgery import options, plan_of
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
    code = SLOW.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[1])])
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


# --- edits that copy


class Computed:
    """A checkpoint whose bytes lie nowhere."""

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored

    def __getattr__(self, name: str) -> object:
        return getattr(self._stored, name)

    def place(self, _: str) -> None:
        return None


@pytest.mark.parametrize("lies_in_a_file", [True, False])
def test_a_copy_is_byte_for_byte(tmp_path: Path, source: Path, lies_in_a_file: bool) -> None:
    stored = open_checkpoint(source)
    checkpoint = stored if lies_in_a_file else Computed(stored)
    edits = tuple(copy_edit(checkpoint, name) for name in stored)
    run(Plan("copy", {"base": source}, {}, edits, {}, lambda _: {}), tmp_path / "out", options())
    was = safetensors.deserialize((source / "model.safetensors").read_bytes())
    now = safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes())
    assert dict(now) == dict(was)


def test_mapped_memory_is_given_back_while_a_tensor_is_read(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    safetensors.numpy.save_file(
        {"w": np.zeros((5000, 2000), np.float32)}, source / "model.safetensors"
    )
    checkpoint = open_checkpoint(source)
    released = []

    class Watched(Computed):
        def place(self, name: str) -> tuple[Path, int] | None:
            return checkpoint.place(name)

        def release(self, name: str) -> None:
            released.append(name)
            checkpoint.release(name)

    edits = (cast_edit(Watched(checkpoint), "w", "BF16"),)
    rehearse(Plan("cast", {"base": source}, {}, edits, {}, lambda _: {}), RunOptions())
    assert len(released) == 3  # 40 MB in windows of 16 MiB, and the end


def test_the_output_is_given_up_when_its_files_cannot_be_made(tmp_path: Path, source: Path) -> None:
    """An Output that fails to begin gives its lock back and leaves nothing."""
    (shard,) = lay_out([TensorInfo("w", "U8", (10,))], 1 << 30, {})
    with pytest.raises(OutputError) as error:
        Output(
            tmp_path / "out",
            [shard, replace(shard, file="no/such/dir.safetensors")],
            "p",
            OutputOptions(),
        )
    assert str(error.value) == (
        f"{tmp_path}/out.partial/no/such/dir.safetensors: the file cannot be written (No such file or "
        "directory). Check the disk, or name another output."
    )
    assert left(tmp_path) == []
    run(plan_of(source), tmp_path / "out", options())
