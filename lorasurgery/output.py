"""The output directory: absent, resumable or complete, never wrong.

Everything is written into OUT.partial, with a journal of finished edits; a rename makes it OUT.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.arrays import Array
from lorasurgery.checkpoint import JOURNAL, SCRATCH
from lorasurgery.errors import OutputError
from lorasurgery.formats._writer import Layout, Writer
from lorasurgery.place import clear, lock, partial_of, put_in_place, writing

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What may happen to what is there already, and how hard to push data to the disk."""

    overwrite: bool = False
    resume: bool = False
    durable: bool = False
    max_shard: int = 5_000_000_000


class Output:
    """OUT.partial while it grows; `commit` makes it OUT, `abandon` removes it."""

    def __init__(
        self, path: Path, shards: Sequence[Layout], plan_id: str, options: OutputOptions
    ) -> None:
        self.path, self.partial, self.options = path, partial_of(path), options
        self.done: dict[str, dict[str, Any]] = {}
        self._made = [p for p in path.absolute().parents if not p.exists()]
        self._lock, self._journal = threading.Lock(), -1
        self._writers: list[Writer] = []
        self._writeback = ThreadPoolExecutor(1, thread_name_prefix="writeback")
        self._ours = self._complete = False
        try:
            with writing(self.partial, "the output"):
                resuming = self._take(plan_id, shards)
            for shard in shards:
                with writing(self.partial / shard.file, "the file"):
                    self._writers.append(Writer(self.partial, shard, resume=resuming))
            if not resuming:
                self._append({"plan": plan_id, "boot": _boot_id()})
        except BaseException:
            self.abandon()
            raise
        self._owner = {i.name: w for w in self._writers for i in w.shard.infos}

    def write(self, name: str, offset: int, data: Array) -> None:
        writer = self._owner[name]
        with writing(writer.path, name):
            writer.write(name, offset, data)

    def copy(self, name: str, source: Path, at: int) -> None:
        writer = self._owner[name]
        with writing(writer.path, f"{name}, copied from {source},"):
            writer.copy(name, source, at)

    def file_of(self, name: str) -> str:
        return self._owner[name].shard.file

    def record(self, edit: str, entry: Mapping[str, Any], targets: Iterable[str]) -> None:
        """The edit's targets are complete: note it, so that a resumed run skips it."""
        for name in targets:
            # the call waits while the disk's queue is full, which is no reason for a worker to wait
            self._writeback.submit(self._owner[name].start_writeback, name)
        self._append({"edit": edit, **entry})

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """Write the index and the side files in their order, then make the directory what it is to be."""
        if len(self._writers) > 1:
            files = {INDEX: self._index(), **files}
        for name, content in files.items():
            with writing(self.partial / name, "the file"):
                _put(self.partial / name, content)
        with writing(self.path, "the output"):
            self._close_files(durable=self.options.durable)
            if self.options.durable:
                _fsync_tree(self.partial)
            old = put_in_place(self.partial, self.path, overwrite=self.options.overwrite)
        self._ours, self._complete = False, True
        with suppress(OSError):  # whatever is left over
            shutil.rmtree(self.path / SCRATCH, ignore_errors=True)
            if old:
                clear(old[0])
            (self.path / JOURNAL).unlink()
        if old:
            os.close(old[1])
        self._unlock()
        if self.options.durable:
            with writing(self.path, "its name"):
                _fsync(self.path.absolute().parent)

    def abandon(self) -> bool:
        """Leave nothing behind, or what --resume can go on with. False: it is complete."""
        with suppress(OSError):
            self._close_files()
        if self._ours and not (self.options.resume and self.done):
            with suppress(OSError):
                clear(self.partial)
            for parent in self._made:  # nearest first
                with suppress(OSError):
                    parent.rmdir()
        self._unlock()
        return not self._complete

    def leave(self) -> None:
        """Let go of OUT.partial as it is, for --resume."""
        with suppress(OSError):
            self._close_files()
        self._unlock()

    def _take(self, plan_id: str, shards: Sequence[Layout]) -> bool:
        """Own OUT.partial: fresh, or the one of a killed run. True if that run goes on."""
        there = self.partial.exists() or self.partial.is_symlink()
        if there and not _is_ours(self.partial):
            raise OutputError(
                f"{self.partial}: is there, but no run of this program made it. Move it away, or "
                "name another output."
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._ours = not there
        held = lock(self.partial)
        if held is None:
            self._ours = False
            raise OutputError(
                f"{self.partial}: another run is writing it. Wait for it, or name another output."
            )
        self._journal = held
        if there and not (self.options.resume or self.options.overwrite):
            raise OutputError(
                f"{self.partial}: left by an interrupted run. Pass --resume to go on with it, "
                "or --overwrite to discard it."
            )
        if there and self.options.resume and self._reload(plan_id, shards):
            self._ours = True
            return True
        self._ours = True
        clear(self.partial, keep=True)
        os.ftruncate(self._journal, 0)
        return False

    def _reload(self, plan_id: str, shards: Sequence[Layout]) -> bool:
        """Take up the journal; False where there is nothing in it that can be gone on with."""
        text = (self.partial / JOURNAL).read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a kill may have cut the last line
        try:
            first, *entries = (json.loads(line) for line in whole.splitlines())
            done = {entry["edit"]: entry for entry in entries}
            plan, boot = first["plan"], first["boot"]
        except (ValueError, KeyError, TypeError):
            return False
        if plan != plan_id:
            raise OutputError(
                f"{self.partial}: was begun by another command or with other inputs. "
                "Repeat that command, or pass --overwrite instead of --resume."
            )
        # after a restart, what the page cache held of the files may be lost
        if (shards and boot != _boot_id()) or not all(
            intact(self.partial, shard) for shard in shards
        ):
            return False
        os.ftruncate(self._journal, len(whole))
        self.done = done
        return True

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            with writing(self.partial / JOURNAL, "the journal"):
                os.write(self._journal, line)
            if "edit" in entry:
                self.done[entry["edit"]] = dict(entry)

    def _index(self) -> bytes:
        infos = [info for w in self._writers for info in w.shard.infos]
        index = {
            "metadata": {"total_size": sum(info.nbytes for info in infos)},
            "weight_map": {
                i.name: self.file_of(i.name) for i in sorted(infos, key=lambda i: i.name)
            },
        }
        return json.dumps(index, indent=2).encode() + b"\n"

    def _close_files(self, *, durable: bool = False) -> None:
        self._writeback.shutdown(cancel_futures=True)
        writers, self._writers = self._writers, []
        for writer in writers:
            writer.close(durable=durable)

    def _unlock(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


def _put(target: Path, content: bytes | Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, target)
    else:
        target.write_bytes(content)


def _is_ours(folder: Path) -> bool:
    """A directory with a journal, or one that a run was killed in before it had one."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / JOURNAL).is_file() or not any(folder.iterdir())


def intact(folder: Path, shard: Layout) -> bool:
    """Whether a file of an interrupted run is the one that this run would have laid out."""
    try:
        with (folder / shard.file).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == shard.size and file.read(len(shard.head)) == shard.head
    except OSError:
        return False


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)
