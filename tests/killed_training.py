"""A process that kills `lorasurgery train` at chosen moments and resumes it: torch's threads survive no fork of
pytest's own process, so that this one forks before any of them runs.

    python -m tests.killed_training HOME MOMENT,... [flags of train]
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lorasurgery.cli import app
from lorasurgery.training import setup, state, train, trainer, written
from tests.forked import Child

__all__ = ["setup", "state", "train", "written"]  # imported once, for every child

DISK = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def moments(reached: Callable[[str], None], output: str) -> None:
    """From now on `reached` is called with a name before, in and after steps, and when the output is touched."""
    step, fsync = trainer.Trainer.step, os.fsync

    def stepped(self: trainer.Trainer) -> dict[str, float]:
        reached("step")
        told = step(self)
        reached("stepped")
        return told

    def synced(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.suffix == ".part":
            content = path.read_bytes()
            os.ftruncate(fd, len(content) // 2)
            reached("half a state")
            os.pwrite(fd, content, 0)
        fsync(fd)

    def audit(name: str, arguments: tuple[object, ...]) -> None:
        if name in DISK and output in str(arguments):
            reached(f"{name} {Path(str(arguments[0])).name}")

    trainer.Trainer.step, os.fsync = stepped, synced  # type: ignore[method-assign]
    sys.addaudithook(audit)


def surgery(output: Path, flags: list[str], reached: Callable[[str], None] | None = None) -> str:
    """The command in a process of its own: how it ended."""

    def work() -> None:
        sys.argv = ["lorasurgery", "train", *flags, "-o", str(output), "-q"]
        if reached:
            moments(reached, str(output))
        with suppress(SystemExit):
            app.main()

    return Child(work).wait()


def tree(folder: Path) -> dict[str, bytes]:
    """What does not tell the time."""
    timed = ("surgery.json", "metrics.jsonl")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in timed}


def main(home: Path, asked: list[str], flags: list[str]) -> None:
    """At the last but one of each moment that was asked for; a difference is an AssertionError."""
    straight, noted = home / "straight", home / "noted"

    def note(name: str) -> None:
        with noted.open("a") as file:
            file.write(name + "\n")

    assert surgery(straight, flags, note) == "done"
    seen, wanted = noted.read_text().splitlines(), tree(straight)
    for name in asked:
        number = [i for i, other in enumerate(seen) if other == name][-2:][0]
        output, count = home / f"at{number}", 0

        def kill(_name: str, number: int = number) -> None:
            nonlocal count
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        assert surgery(output, flags, kill) == "killed", name
        assert surgery(output, [*flags, "--resume"]) == "done", name
        assert tree(output) == wanted, name
        left = [p.name for p in home.iterdir() if p.name.startswith(f"{output.name}.")]
        assert left == [], name
        shutil.rmtree(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:])
