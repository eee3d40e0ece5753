"""The one place where an error becomes a line on stderr and an exit code."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lorasurgery.errors import LoraSurgeryError

_WHAT_TO_DO = {
    errno.ENOSPC: "Make room, or name another output.",
    errno.EDQUOT: "Make room, or name another output.",
    errno.EACCES: "Check who may read and write there.",
    errno.EPERM: "Check who may read and write there.",
    errno.EROFS: "Name another output.",
    errno.EIO: "The disk or the network failed; copy the file anew.",
    errno.ENOENT: "Check the path.",
}


class Interrupted(LoraSurgeryError):
    """Ctrl-C, with what is left of the output."""

    exit_code = 130


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what a user can put right into `error: ...` and an exit code; a bug keeps its traceback."""
    try:
        yield
    except BrokenPipeError:
        raise typer.Exit(1) from None
    except LoraSurgeryError as error:
        _complain(str(error))
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        _complain(_describe(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _complain("interrupted.")
        raise typer.Exit(130) from None


def _describe(error: OSError) -> str:
    """The system's own words, the file's name, and what may help."""
    # a move names two files, and the one that is written comes last
    where = error.filename2 or error.filename
    what = error.strerror or str(error)
    advice = _WHAT_TO_DO.get(error.errno or 0, "")
    return " ".join(filter(None, [f"{where}:" if where else "", f"{what}.", advice]))


def _complain(message: str) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
