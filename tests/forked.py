"""A test's work in a child process: to be killed, interrupted, limited, or run as nobody."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lorasurgery import place
from lorasurgery.errors import LoraSurgeryError

NOBODY = 65534


class Child:
    """A forked process that says one thing: what `work` raised that a user would see, or 'done'."""

    def __init__(self, work: Callable[[], object]) -> None:
        read, write = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            # threads of this process do not exist in the child: it may only end by itself
            os.close(read)
            os.write(write, _said(work).encode()[:60_000])
            os._exit(0)
        os.close(write)
        self._read = read

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> str:
        """What it said: 'done', a message, 'interrupted', 'killed' or a traceback."""
        with os.fdopen(self._read, "rb") as pipe:
            said = pipe.read().decode()
        _, status = os.waitpid(self.pid, 0)
        return "killed" if os.WIFSIGNALED(status) and not said else said


def _said(work: Callable[[], object]) -> str:
    try:
        work()
    except LoraSurgeryError as error:
        return str(error)
    except KeyboardInterrupt:
        return "interrupted"
    except BaseException:  # noqa: BLE001 - the parent's assertion shows it
        return traceback.format_exc()
    return "done"


def as_nobody(work: Callable[[], object]) -> str:
    """What `work` says where file modes count, which they do not for root."""

    def dropped() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        work()

    return Child(dropped).wait()


def with_files_up_to(nbytes: int, work: Callable[[], object]) -> str:
    """What `work` says where no file may grow beyond nbytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        work()

    return Child(limited).wait()


# --- killed at a step

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.scandir",
          "os.listdir", "shutil.copyfile", "shutil.rmtree", "fcntl.flock")  # fmt: skip


def kill_at(step: int, counted: list[str] | None = None) -> None:
    """From now on, this process kills itself at a step that touches the disk, or counts them.

    A write is two steps: before it, and when half of it is done.
    """
    seen = 0

    def event(name: str) -> None:
        nonlocal seen
        if counted is not None:
            counted.append(name)
        if seen == step:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name in EVENTS and "out" in str(arguments):
            event(name)

    pwrite, write, exchange = os.pwrite, os.write, place._exchange

    def half_write(fd: int, data: bytes, at: int) -> int:
        event("pwrite")
        n = pwrite(fd, data[: (len(data) + 1) // 2], at)
        event("half written")
        return n

    def half_line(fd: int, data: bytes) -> int:
        event("journal")
        n = write(fd, data[: len(data) // 2])
        event("half a line")
        return n + write(fd, data[n:])

    def exchanged(a: Path, b: Path) -> bool:
        event("before the exchange")
        done = exchange(a, b)
        event("after the exchange")
        return done

    sys.addaudithook(audit)
    os.pwrite, os.write, place._exchange = half_write, half_line, exchanged


def count_steps(work: Callable[[], object], file: Path) -> list[str]:
    counted: list[str] = []

    def child() -> None:
        kill_at(-1, counted)
        with suppress(Exception):
            work()
        file.write_text("\n".join(counted))

    assert Child(child).wait() == "done"
    return file.read_text().splitlines()


def kill(step: int, work: Callable[[], object]) -> None:
    def child() -> None:
        kill_at(step)
        work()

    assert Child(child).wait() == "killed"
