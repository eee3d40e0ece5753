"""A test's work in a child process: to be killed, interrupted, limited, or run as nobody."""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

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
