"""An output while it grows: who may write it, how it comes to be, and what is left when that fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from lorasurgery import output as module
from lorasurgery import place
from lorasurgery.checkpoint import JOURNAL, SCRATCH, open_checkpoint
from lorasurgery.errors import FormatError, OutputError
from lorasurgery.formats import _writer
from lorasurgery.formats._writer import lay_out
from lorasurgery.output import INDEX, Output, OutputOptions
from lorasurgery.tensors import TensorInfo
from tests.outputs import DATA, OVERWRITE, RESUME, A, B, begun, fill, killed, tree, written


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    safetensors.numpy.save_file({"w": np.ones(3)}, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


# --- what comes out


def test_an_output_appears_whole_with_its_files_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "er" / "out"
    written(out, **{"config.json": "{}", "sub/a.txt": "x"})
    assert sorted(tree(tmp_path)) == [
        f"deep/er/out/{name}" for name in ("config.json", "model.safetensors", "sub/a.txt")
    ]
    content = dict(safetensors.deserialize((out / "model.safetensors").read_bytes()))
    assert {name: bytes(t["data"]) for name, t in content.items()} == DATA


def test_shards_have_an_index_of_true_sizes_in_the_usual_names(tmp_path: Path) -> None:
    infos = [TensorInfo(f"t{i}", "U8", (100 + i,)) for i in range(7)]
    output = Output(
        tmp_path / "out", lay_out(infos, 250, {"format": "pt"}), "plan", OutputOptions()
    )
    output.commit({})
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    found, nbytes = {}, 0
    for file in files:
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = file.name
            nbytes += len(tensor["data"])
    assert index == {"metadata": {"total_size": nbytes}, "weight_map": found}
    assert nbytes == sum(range(100, 107))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own() -> None:
    infos = [TensorInfo(str(n), "U8", (n,)) for n in (10, 500, 20)]
    assert [[i.name for i in s.infos] for s in lay_out(infos, 100, {})] == [["10"], ["500"], ["20"]]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_old_output_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(place, "_exchange", lambda _a, _b: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    output = fill(begun(out, OVERWRITE), "a", "b")
    assert tree(out) == {"old.txt": b"old"}
    output.commit({})
    assert list(tree(tmp_path)) == ["out/model.safetensors"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_the_system_can_exchange_two_directories_here(tmp_path: Path) -> None:
    """If this fails, the file system under the tests is an unusual one: see place._exchange."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "was").write_text(name)
    assert place._exchange(tmp_path / "a", tmp_path / "b")
    assert tree(tmp_path) == {"a/was": b"b", "b/was": b"a"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_an_old_output_is_back_when_the_last_step_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out, rename = tmp_path / "out", os.rename
    written(out, **{"old.txt": "old"})
    before = tree(out)

    def fail(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    def rename_once(source: Path, target: Path) -> None:
        if target == out and source == place.partial_of(out) and not out.exists():
            fail()
        rename(source, target)

    monkeypatch.setattr(place, "_exchange", fail if exchange else lambda _a, _b: False)
    monkeypatch.setattr(os, "rename", rename_once)
    output = fill(begun(out, OVERWRITE), "a", "b")
    with pytest.raises(OutputError) as error:
        output.commit({})
    output.abandon()
    assert str(error.value) == (
        f"{out}: the output cannot be written (Input/output error). "
        "Check the disk, or name another output."
    )
    assert tree(out) == before
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_an_output_that_something_else_fills_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    output = fill(begun(out), "a", "b")
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError) as error:
        output.commit({})
    output.abandon()
    assert str(error.value) == (
        f"{out}: was filled by something else meanwhile. Pass --overwrite, or name another."
    )
    assert tree(tmp_path) == {"out/mine.txt": b"mine"}


def test_abandoning_leaves_no_file_and_no_directory_that_was_made(tmp_path: Path) -> None:
    fill(begun(tmp_path / "x" / "y" / "out"), "a").abandon()
    assert list(tmp_path.iterdir()) == []


def test_abandoning_a_resumable_run_leaves_what_it_can_go_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(begun(out, RESUME), "a").abandon()
    assert [f.name for f in tmp_path.iterdir()] == ["out.partial"]
    output = begun(out, RESUME)
    assert list(output.done) == ["a"]
    fill(output, "b").commit({})
    content = dict(safetensors.deserialize((out / "model.safetensors").read_bytes()))
    assert {name: bytes(t["data"]) for name, t in content.items()} == DATA


# --- two at once, and what others left


def test_two_runs_at_once_are_refused_whatever_is_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = fill(begun(out), "a")
    for options in (OutputOptions(), RESUME, OVERWRITE):
        with pytest.raises(OutputError) as error:
            begun(out, options)
        assert str(error.value) == (
            f"{out}.partial: another run is writing it. Wait for it, or name another output."
        )
    fill(first, "b").commit({})
    assert open_checkpoint(out).read("a").tobytes() == DATA["a"]


def test_a_run_that_waits_at_the_door_does_not_get_an_output_that_was_just_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has opened the journal when the first run ends: the lock it gets then is on nothing."""
    out, flock = tmp_path / "out", place.fcntl.flock
    first = fill(begun(out), "a", "b")

    def late(fd: int, how: int) -> None:
        monkeypatch.setattr(place.fcntl, "flock", flock)
        first.commit({})
        flock(fd, how)

    monkeypatch.setattr(place.fcntl, "flock", late)
    with pytest.raises(OutputError) as error:
        begun(out, OVERWRITE)
    assert str(error.value) == (
        f"{out}.partial: another run is writing it. Wait for it, or name another output."
    )
    assert list(tree(tmp_path)) == ["out/model.safetensors"]


@pytest.mark.parametrize("code", [38, 37, 95, 22])
def test_a_file_system_that_locks_nothing_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(place.fcntl, "flock", cannot)
    written(tmp_path / "out")
    written(tmp_path / "out", OVERWRITE)
    assert open_checkpoint(tmp_path / "out").read("a").tobytes() == DATA["a"]
    assert list(tree(tmp_path)) == ["out/model.safetensors"]


def test_what_a_killed_run_left_needs_a_word_from_the_user(tmp_path: Path) -> None:
    partial = killed(tmp_path / "out", "a")
    before = tree(partial)
    with pytest.raises(OutputError) as error:
        begun(tmp_path / "out")
    assert str(error.value) == (
        f"{partial}: left by an interrupted run. Pass --resume to go on with it, or --overwrite to "
        "discard it."
    )
    assert tree(partial) == before
    assert begun(tmp_path / "out", OVERWRITE).done == {}


def test_what_a_killed_run_left_is_not_read_as_a_model(tmp_path: Path) -> None:
    partial = killed(tmp_path / "out", "a")
    with pytest.raises(FormatError) as error:
        open_checkpoint(partial)
    assert str(error.value) == (
        f"{partial}: an interrupted run left it unfinished. Repeat that command with --resume."
    )


def test_a_journal_of_another_command_is_refused_and_kept(tmp_path: Path) -> None:
    partial = killed(tmp_path / "out", "a")
    before = tree(partial)
    for _ in range(2):  # the refusal gives the lock back
        with pytest.raises(OutputError) as error:
            begun(tmp_path / "out", RESUME, plan="another plan")
        assert str(error.value) == (
            f"{partial}: was begun by another command or with other inputs. "
            "Repeat that command, or pass --overwrite instead of --resume."
        )
    assert tree(partial) == before


@pytest.mark.parametrize("tail", [b'{"edit": "b", "metr', b'{"edit": "b"}', b"\0\0\0", b"{"])
def test_a_journal_line_that_was_cut_is_forgotten(tmp_path: Path, tail: bytes) -> None:
    out, partial = tmp_path / "out", killed(tmp_path / "out", "a")
    with (partial / JOURNAL).open("ab") as file:
        file.write(tail)
    assert list(begun_and_killed(out)) == ["a"]
    output = begun(out, RESUME)  # and what was appended after it is a line of its own
    assert list(output.done) == ["a", "b"]
    output.commit({})
    assert open_checkpoint(out).read("b").tobytes() == DATA["b"]


def begun_and_killed(out: Path) -> dict[str, object]:
    output = begun(out, RESUME)
    done = dict(output.done)
    fill(output, "b")
    output._close_files()
    output._unlock()
    return done


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"nonsense\n", b'{"plan": "plan"}\n', b'"x"\n', b"\xff\xfe\n"]
)
def test_a_journal_that_says_nothing_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    out, partial = tmp_path / "out", killed(tmp_path / "out", "a")
    (partial / JOURNAL).write_bytes(content)
    output = begun(out, RESUME)
    assert output.done == {}
    fill(output, "a", "b").commit({})
    assert open_checkpoint(out).read("a").tobytes() == DATA["a"]


@pytest.mark.parametrize("damage", ["gone", "cut", "header"])
def test_a_partial_file_that_is_not_as_it_was_laid_out_is_begun_anew(
    tmp_path: Path, damage: str
) -> None:
    out, file = tmp_path / "out", killed(tmp_path / "out", "a") / "model.safetensors"
    if damage == "gone":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.write_bytes(bytes(file.stat().st_size))
    output = begun(out, RESUME)
    assert output.done == {}
    fill(output, "a", "b").commit({})
    assert open_checkpoint(out).read("a").tobytes() == DATA["a"]


def test_after_a_restart_of_the_machine_all_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(tmp_path / "out", "a")
    monkeypatch.setattr(module, "_boot_id", lambda: "another boot")
    assert begun(tmp_path / "out", RESUME).done == {}


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
@pytest.mark.parametrize("options", [OutputOptions(), RESUME, OVERWRITE])
def test_a_partial_directory_that_is_not_ours_is_never_touched(
    tmp_path: Path, kind: str, options: OutputOptions
) -> None:
    partial, mine = tmp_path / "out.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    if kind == "folder":
        mine.rename(partial)
    elif kind == "link":
        partial.symlink_to(mine)
    else:
        partial.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError) as error:
        begun(tmp_path / "out", options)
    assert str(error.value) == (
        f"{partial}: is there, but no run of this program made it. Move it away, or name another "
        "output."
    )
    assert tree(tmp_path) == before


def test_a_replaced_directory_that_is_not_ours_is_never_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "_exchange", lambda _a, _b: False)
    out, mine = tmp_path / "out", tmp_path / "out.replaced"
    mine.mkdir()
    (mine / "mine.txt").write_text("mine")
    written(out)
    before = tree(tmp_path)
    place.recover(out)
    output = fill(begun(out, OVERWRITE), "a", "b")
    with pytest.raises(OutputError) as error:
        output.commit({})
    output.abandon()
    assert str(error.value) == (
        f"{out}: the output cannot be written (Directory not empty). "
        "Check the disk, or name another output."
    )
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["mine", ""])
def test_a_directory_of_the_users_is_left_as_it_is_whatever_is_in_it(
    tmp_path: Path, content: str
) -> None:
    """Our names in it do not make it ours, but for an empty journal: that one marks, and is removed."""
    out = tmp_path / "out"
    for name in (".journal.jsonl", f"{SCRATCH}/mine.txt", "model.txt"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    before = tree(tmp_path)
    (out / JOURNAL).write_text(content)
    if content:
        before = tree(tmp_path)
    place.recover(out)
    assert tree(tmp_path) == before


def test_an_old_output_that_was_marked_for_its_end_is_still_read(model: Path) -> None:
    (model / JOURNAL).touch()
    assert list(open_checkpoint(model)) == ["w"]


# --- the disk


def full(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_is_met_when_the_room_is_reserved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as error:
        begun(tmp_path / "x" / "out")
    assert str(error.value) == (
        f"{tmp_path}/x/out.partial/model.safetensors: the file cannot be written (No space left on "
        "device). Make room, or name another output."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["pwrite", "copy_file_range"])
def test_a_disk_that_fills_up_is_one_line_that_names_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A compressed or copied-on-write file may need room again that it had reserved."""
    source = tmp_path / "source"
    source.write_bytes(DATA["a"])
    output = begun(tmp_path / "out")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OutputError) as error:
        fill(output, "a") if step == "pwrite" else output.copy("a", source, 0)
    what = "a" if step == "pwrite" else f"a, copied from {source},"
    assert str(error.value) == (
        f"{tmp_path}/out.partial/model.safetensors: {what} cannot be written (No space left on "
        "device). Make room, or name another output."
    )
    output.abandon()
    assert [f.name for f in tmp_path.iterdir()] == ["source"]


def test_a_journal_on_a_full_disk_is_one_line(tmp_path: Path) -> None:
    output = begun(tmp_path / "out")
    os.dup2(os.open("/dev/full", os.O_WRONLY), output._journal)
    with pytest.raises(OutputError) as error:
        fill(output, "a")
    assert str(error.value) == (
        f"{tmp_path}/out.partial/{JOURNAL}: the journal cannot be written (No space left on device). "
        "Make room, or name another output."
    )
    output.abandon()
    assert list(tmp_path.iterdir()) == []


def test_a_side_file_that_cannot_be_copied_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    output = fill(begun(tmp_path / "out"), "a", "b")
    with pytest.raises(OutputError) as error:
        output.commit({"tokenizer.json": tmp_path / "gone.json"})
    output.abandon()
    assert str(error.value) == (
        f"{tmp_path}/out.partial/tokenizer.json: the file cannot be written (No such file or "
        "directory). Check the disk, or name another output."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [95, 22, 38])
def test_a_file_system_that_cannot_reserve_room_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def cannot(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", cannot)
    written(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").read("a").tobytes() == DATA["a"]


@pytest.mark.parametrize("answer", [18, 38, 22, 95, 1, 0])
def test_bytes_that_the_system_will_not_copy_between_two_files_are_read_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """0: some file systems say 'nothing copied' though there is more."""

    def cannot(*_: object) -> int:
        if answer:
            raise OSError(answer, os.strerror(answer))
        return 0

    monkeypatch.setattr(os, "copy_file_range", cannot)
    data = np.random.default_rng(0).bytes((1 << 21) + 5)  # more than one piece
    (tmp_path / "source").write_bytes(b"head" + data)
    info = TensorInfo("big", "U8", (len(data),))
    output = Output(tmp_path / "out", lay_out([info], 1 << 30, {}), "plan", OutputOptions())
    output.copy("big", tmp_path / "source", 4)
    output.commit({})
    assert open_checkpoint(tmp_path / "out").read("big").tobytes() == data


@pytest.mark.parametrize("fallback", [False, True])
def test_a_source_that_ends_within_a_tensor_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallback: bool
) -> None:
    if fallback:
        monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    source = tmp_path / "source"
    source.write_bytes(DATA["a"][:20])
    output = begun(tmp_path / "out")
    with pytest.raises(FormatError) as error:
        output.copy("a", source, 0)
    output.abandon()
    assert str(error.value) == (
        f"{source}: ends within a: it shrank while it was read. Restore the file."
    )


def test_a_durable_output_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events, fsync, rename = [], os.fsync, os.rename

    def noted(fd: int) -> None:
        events.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        fsync(fd)

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    written(tmp_path / "out", OutputOptions(durable=True), **{"sub/config.json": "{}"})
    at = events.index("rename")
    partial = tmp_path / "out.partial"
    names = ("model.safetensors", "sub", "sub/config.json", "")
    assert set(events[:at]) >= {str(partial / name) for name in names}
    assert events[at + 1 :] == [str(tmp_path)]


def test_without_durable_nothing_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    written(tmp_path / "out")
    assert calls == []


def test_writeback_is_begun_for_each_tensor_that_has_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Libc:
        def sync_file_range(self, _fd: int, begin: object, length: object, flags: int) -> None:
            calls.append((begin.value, length.value, flags))

    monkeypatch.setattr(_writer, "_LIBC", Libc())
    empty = TensorInfo("empty", "F32", (0, 4))
    (shard,) = lay_out([A, B, empty], 1 << 30, {})
    output = Output(tmp_path / "out", [shard], "plan", OutputOptions())
    output.record("e", {}, ["a", "b", "empty"])
    output._writeback.shutdown()
    start = len(shard.head)
    assert calls == [(start, 32, 2), (start + 32, 6, 2)]
    output.abandon()
