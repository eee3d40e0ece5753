"""The engine: what a run gives, what it holds in memory, and what is there when it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import blake3
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from lorasurgery import output as output_module
from lorasurgery import surgery
from lorasurgery.checkpoint import MANIFEST, Checkpoint, open_checkpoint
from lorasurgery.edit import Edit, Metrics, Step, copy_edit, tile_rows
from lorasurgery.errors import FormatError, OutputError, ShapeError, VerificationError
from lorasurgery.formats._writer import lay_out
from lorasurgery.operations.convert_checkpoint import cast_edit
from lorasurgery.output import Output, OutputOptions
from lorasurgery.surgery import Plan, Report, RunOptions, rehearse, run
from lorasurgery.tensors import TensorInfo
from tests.forked import with_files_up_to
from tests.runs import NAMES, SHARDED, left, make, options, plan_of, tree


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source") / "model")


def b3(data: bytes) -> str:
    return f"blake3:{blake3.blake3(data).hexdigest()}"


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
