"""Where an output may go, and how a finished directory takes its place in one step.

OUT.partial is put together beside OUT. Where OUT is there already, the two names are exchanged, so that OUT
is the old or the new one at any moment; a file system that cannot do it has OUT.replaced for a moment.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorasurgery.checkpoint import JOURNAL, MANIFEST, SCRATCH
from lorasurgery.errors import OutputError

_SLACK = 16 << 20  # directory entries, the index, the undo's header
_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
FULL = (errno.ENOSPC, errno.EDQUOT)


def partial_of(path: Path) -> Path:
    """Where an output is put together."""
    return path.with_name(path.name + ".partial")


def replaced_of(path: Path) -> Path:
    """Where the old output lies between two renames."""
    return path.with_name(path.name + ".replaced")


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputError unless writing `path` leaves these inputs alone."""
    if path.name in ("", ".."):
        raise OutputError(f"{path}: names no directory of its own. Give the output a name.")
    inputs = tuple(inputs)
    for taken in (path, partial_of(path), replaced_of(path)):
        for source in inputs:
            _check_apart(taken, source)


def _check_apart(path: Path, source: Path) -> None:
    target, home = path.resolve(), source.resolve()
    inside = source.is_dir() and home in target.parents
    home = home if source.is_dir() else home.parent
    if target in (source.resolve(), home) or target in home.parents:
        raise OutputError(f"{path}: is or holds the input {source}. Name another output.")
    if inside:
        raise OutputError(f"{path}: lies inside the input {source}. Name another output.")


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where something is that may not be replaced."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise OutputError(f"{path}: is there and is no directory. Name another output.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputError(f"{path}: exists and is not empty. Pass --overwrite, or name another.")


def check_room(path: Path, nbytes: int) -> None:
    """Raise OutputError unless the nearest directory above can be written to and has the room."""
    home = next(parent for parent in path.absolute().parents if parent.exists())
    if not home.is_dir():
        raise OutputError(f"{path}: {home} is a file, no directory. Name another output.")
    if not os.access(home, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {home} cannot be written to. Name another output.")
    # what an earlier run took is taken over or removed
    there = sum(f.lstat().st_blocks * 512 for f in partial_of(path).rglob("*"))
    free = shutil.disk_usage(home).free + there
    if nbytes + _SLACK > free:
        raise OutputError(
            f"{path}: needs {(nbytes + _SLACK) >> 20} MiB, but {home} has {free >> 20} MiB free. "
            "Make room, or name another output."
        )


@contextmanager
def writing(where: Path, what: str) -> Iterator[None]:
    """What the system says while `what` is written, as one line that names it."""
    try:
        yield
    except OSError as error:
        advice = "Make room" if error.errno in FULL else "Check the disk"
        raise OutputError(
            f"{where}: {what} cannot be written ({error.strerror}). "
            f"{advice}, or name another output."
        ) from None


def lock(folder: Path) -> int | None:
    """Hold a directory's journal, made if need be; None if another run holds it."""
    fd = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        _flock(fd)
        # the other run may have ended, and taken its file away, since it was opened here
        if os.path.samestat(os.fstat(fd), (folder / JOURNAL).stat()):
            return fd
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.ENOENT):
            os.close(fd)
            raise
    os.close(fd)
    return None


def _flock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # some cluster file systems lock nothing: two runs at once are the user's to avoid there
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise


def clear(folder: Path, *, keep: bool = False) -> None:
    """Remove a directory of ours, its journal last: until then it can be told as ours."""
    for entry in folder.iterdir():
        if entry.name != JOURNAL:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    if not keep:
        (folder / JOURNAL).unlink(missing_ok=True)
        folder.rmdir()


def recover(path: Path) -> None:
    """Put right what a run has left that was killed while it replaced `path`."""
    old = replaced_of(path)
    with _held(old) as killed:
        if killed and not path.exists():
            os.rename(old, path)
        elif killed and (path / JOURNAL).exists():
            clear(old)
    with _held(path) as killed:
        begun = killed and (path / JOURNAL).stat().st_size > 0
        if begun and (path / MANIFEST).exists():
            _tidy(path)
        if killed and (not begun or (path / MANIFEST).exists()):
            (path / JOURNAL).unlink()


def _tidy(path: Path) -> None:
    """The new output is here: what it needed, and the old one, may be there still."""
    with _held(partial_of(path)) as leftover:
        if leftover:
            clear(partial_of(path))
    shutil.rmtree(path / SCRATCH, ignore_errors=True)
    for folder in (replaced_of(path), partial_of(path)):
        with suppress(OSError):  # emptied, but killed before it was removed
            folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether this is a directory with a journal that no run holds; held in here."""
    held = lock(folder) if (folder / JOURNAL).is_file() else None
    try:
        yield held is not None
    finally:
        if held is not None:
            os.close(held)


def put_in_place(new: Path, path: Path, *, overwrite: bool) -> tuple[Path, int] | None:
    """Make the directory `new` what `path` names.

    Returns where the directory lies that was there, and the lock that is held on it.
    """
    try:
        os.rename(new, path)  # onto nothing, or onto an empty directory
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        return None
    if not overwrite:
        raise OutputError(
            f"{path}: was filled by something else meanwhile. Pass --overwrite, or name another."
        )
    held = lock(path)
    if held is None:
        raise OutputError(f"{path}: another run is replacing it. Wait for it.")
    try:
        return _replace(new, path), held
    except BaseException:
        (path / JOURNAL).unlink(missing_ok=True)
        os.close(held)
        raise


def _replace(new: Path, path: Path) -> Path:
    if _exchange(new, path):
        return new
    old = replaced_of(path)
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    return old


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    if not hasattr(_LIBC, "renameat2"):
        return False
    done: int = _LIBC.renameat2(
        _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
    )
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(b))
