"""The command line: every other file in this folder is a command, imported when it is asked for.

convert_checkpoint.py is `lorasurgery convert-checkpoint`.
"""

from __future__ import annotations

import gc
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorasurgery import __version__, plugins
from lorasurgery.cli._errors import one_line
from lorasurgery.cli._options import with_flags


def command_names() -> list[str]:
    """What users type: the names of this folder's files, with hyphens."""
    return [name.replace("_", "-") for name in plugins.names("cli") if name != "app"]


class Commands(TyperGroup):
    """The folder as a group of commands; `lorasurgery inspect` imports inspect.py alone."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return command_names()

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:  # type: ignore[override]
        if cmd_name not in command_names():
            ctx.fail(f"no command {cmd_name!r}. {plugins.suggestion(cmd_name, command_names())}")
        module = plugins.load("cli", cmd_name.replace("-", "_"))
        single = typer.Typer(**_PLAIN)
        single.command(cmd_name, context_settings=_SETTINGS)(with_flags(module.command))
        return typer.main.get_command(single)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        with one_line():
            return super().invoke(ctx)


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
# without markup, help is plain text that fits any terminal, and [@revision] stays as it is
_PLAIN: dict[str, Any] = {
    "add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": None,
}  # fmt: skip

app = typer.Typer(cls=Commands, no_args_is_help=True, context_settings=_SETTINGS, **_PLAIN)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorasurgery {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Surgery on LoRA adapters and quantized checkpoints: file to file, streaming, with proof."""


def main() -> None:
    """What the installed script and `python -m lorasurgery` run."""
    # tensors are worked on side by side: threads inside of numpy's products would only wait for each
    # other. It is read when numpy is imported, which no command has done yet
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # imports make much that stays: to look for garbage in it, again and again, costs a tenth of them
    gc.set_threshold(50_000)
    app(prog_name="lorasurgery")
