"""A progress bar on stderr, where there is a terminal to show it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasurgery.surgery import Progress


@contextmanager
def no_bar(*, quiet: bool) -> Iterator[Progress]:  # noqa: ARG001 - as progress_bar
    """For an operation that shows how it goes itself."""
    yield lambda _done, _total, _name: None


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[Progress]:
    """Yields what the engine calls as edits end; nothing is shown with -q or without a terminal."""
    if quiet or not sys.stderr.isatty():
        with no_bar(quiet=quiet) as nothing:
            yield nothing
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    # rich itself looks at NO_COLOR and TERM=dumb
    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    text = TextColumn("{task.description}")
    with Bar(*columns, text, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def progress(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield progress
