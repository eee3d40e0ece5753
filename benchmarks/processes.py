"""Run a command as a whole process: its wall time and its own peak memory.

Only the standard library is imported here and in `run`: a child's peak, as Linux counts it, begins
at the size of the process that started it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# no hub is asked for anything, on either side
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# what pip installs has its bytecode beside it, and so has what was run once, unless this forbids it
BYTECODE = "PYTHONDONTWRITEBYTECODE"
# ru_maxrss is in KiB, on a Mac in bytes
MIB = 1 << 20 if sys.platform == "darwin" else 1 << 10


@dataclass(frozen=True, slots=True)
class Run:
    """One process, from start to exit."""

    seconds: float
    peak_mib: float
    code: int
    stdout: str


class CommandError(RuntimeError):
    """A command exited with a code that was not expected."""


def run(command: Sequence[str | Path], codes: tuple[int, ...] = (0,)) -> Run:
    """Raises CommandError, with the end of what the command said, for any other exit code."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        env = {k: v for k, v in {**os.environ, **OFFLINE}.items() if k != BYTECODE}
        started = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=err, env=env)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        stdout, stderr = _text(out), _text(err)
    if child.returncode not in codes:
        words = " ".join(str(part) for part in command)
        raise CommandError(f"{words}: exit code {child.returncode}\n{(stderr or stdout)[-3000:]}")
    return Run(seconds, usage.ru_maxrss / MIB, child.returncode, stdout)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
