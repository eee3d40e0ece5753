"""The output directory: absent, resumable or complete, never wrong.

Everything is written into OUT.partial, with a journal of finished edits; a rename makes it OUT.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.arrays import Array
from lorasurgery.errors import OutputError
from lorasurgery.formats._writer import Shard, Writer

JOURNAL = ".journal.jsonl"
INDEX = "model.safetensors.index.json"
_SLACK = 16 << 20  # side files, directory entries, the undo's header


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """What may happen to what is there already, and how hard to push data to the disk."""

    overwrite: bool = False
    resume: bool = False
    durable: bool = False
    max_shard: int = 5_000_000_000


def check_place(path: Path, inputs: Iterable[Path], options: OutputOptions, nbytes: int) -> None:
    """Raise OutputError unless `path` may become an output of nbytes beside these inputs."""
    target = path.resolve()
    for source in inputs:
        home = source.resolve()
        home = home if home.is_dir() else home.parent
        if target == source.resolve() or target == home or target in home.parents:
            raise OutputError(f"{path}: is or holds the input {source}. Name another output.")
        if home in target.parents and source.is_dir():
            raise OutputError(f"{path}: lies inside the input {source}. Name another output.")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path}: is there and is no directory. Name another output.")
    finished = options.resume and (path / "surgery.json").exists()
    if path.is_dir() and any(path.iterdir()) and not options.overwrite and not finished:
        raise OutputError(f"{path}: exists and is not empty. Pass --overwrite, or name another.")
    _check_room(path, partial_of(path), nbytes)


def _check_room(path: Path, partial: Path, nbytes: int) -> None:
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not os.access(home, os.W_OK | os.X_OK):
        raise OutputError(f"{home}: cannot be written to. Name another output.")
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*")) if partial.exists() else 0
    free = shutil.disk_usage(home).free + there
    if nbytes + _SLACK > free:
        raise OutputError(
            f"{path}: needs {(nbytes + _SLACK) >> 20} MiB, but {home} has {free >> 20} MiB free. "
            "Make room, or name another output."
        )


def partial_of(path: Path) -> Path:
    """Where an output is put together."""
    return path.with_name(path.name + ".partial")


class Output:
    """OUT.partial while it grows; `commit` makes it OUT, `abandon` removes it."""

    def __init__(
        self, path: Path, shards: Sequence[Shard], plan_id: str, options: OutputOptions
    ) -> None:
        self.path, self.partial, self.options = path, partial_of(path), options
        self.done: dict[str, dict[str, Any]] = {}
        self._made = [p for p in path.absolute().parents if not p.exists()]
        self._lock = threading.Lock()
        resuming = self._take(plan_id)
        try:
            self._writers = [Writer(self.partial, shard, resume=resuming) for shard in shards]
        except BaseException:
            self._writers = []
            self.abandon()
            raise
        self._owner = {i.name: w for w in self._writers for i in w.shard.infos}
        if not resuming:
            self._append({"plan": plan_id, "boot": _boot_id()})

    def write(self, name: str, offset: int, data: Array) -> None:
        self._owner[name].write(name, offset, data)

    def copy(self, name: str, source: Path, at: int) -> None:
        self._owner[name].copy(name, source, at)

    def file_of(self, name: str) -> str:
        return self._owner[name].shard.file

    def record(self, edit: str, entry: Mapping[str, Any], targets: Iterable[str]) -> None:
        """The edit's targets are complete: note it, so that a resumed run skips it."""
        for name in targets:
            self._owner[name].start_writeback(name)
        self._append({"edit": edit, **entry})

    def commit(self, files: Mapping[str, bytes | Path]) -> None:
        """Write the side files and the index, then make the directory what it is to be."""
        for name, content in files.items():
            target = self.partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, target)
            else:
                target.write_bytes(content)
        if len(self._writers) > 1:
            (self.partial / INDEX).write_bytes(self._index())
        self._close(durable=self.options.durable)
        if self.options.durable:
            _fsync_tree(self.partial)
        self._swap()
        (self.path / JOURNAL).unlink()
        if self.options.durable:
            _fsync(self.path.absolute().parent)

    def abandon(self) -> None:
        """Leave nothing behind, or what --resume can go on with."""
        self._close()
        if self.options.resume and self.done:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        for parent in self._made:  # nearest first
            if parent.exists() and not any(parent.iterdir()):
                parent.rmdir()

    def _take(self, plan_id: str) -> bool:
        """Own OUT.partial: fresh, or the one of a killed run. True if that run goes on."""
        there = self.partial.exists()
        if there and not (self.options.resume or self.options.overwrite):
            raise OutputError(
                f"{self.partial}: left by an interrupted run. Pass --resume to go on with it, "
                "or --overwrite to discard it."
            )
        self.partial.mkdir(parents=True, exist_ok=True)
        self._journal = os.open(self.partial / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._journal)
            raise OutputError(
                f"{self.partial}: another run is writing it. Wait for it, or name another output."
            ) from None
        if there and self.options.resume and self._reload(plan_id):
            return True
        for old in self.partial.iterdir():
            if old.name != JOURNAL:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        os.ftruncate(self._journal, 0)
        return False

    def _reload(self, plan_id: str) -> bool:
        lines = (self.partial / JOURNAL).read_bytes().split(b"\n")[:-1]  # the last may be cut
        entries = [json.loads(line) for line in lines]
        if not entries:
            return False
        if entries[0]["plan"] != plan_id:
            raise OutputError(
                f"{self.partial}: was begun by another command or with other inputs. "
                "Repeat that command, or pass --overwrite instead of --resume."
            )
        if entries[0]["boot"] != _boot_id():  # what the page cache held may be lost
            return False
        self.done = {entry["edit"]: entry for entry in entries[1:]}
        return True

    def _append(self, entry: Mapping[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
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

    def _swap(self) -> None:
        old = self.path.with_name(self.path.name + ".replaced")
        if self.path.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(self.path, old)
        os.rename(self.partial, self.path)
        shutil.rmtree(old, ignore_errors=True)

    def _close(self, *, durable: bool = False) -> None:
        for writer in self._writers:
            writer.close(durable=durable)
        self._writers = []
        if self._journal >= 0:
            os.close(self._journal)
            self._journal = -1


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
