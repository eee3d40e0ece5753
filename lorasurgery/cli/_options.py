"""The flags that commands share, spelled the same everywhere.

A group of flags is a frozen dataclass: a command that takes one has its fields as options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from lorasurgery.cli._config import use_config
from lorasurgery.cli._sizes import size
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.activations.calibration import Calibration

Base = Annotated[str, typer.Argument(help="A model: directory, file, or org/name[@revision].")]
Adapter = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="DIR", help="Lay it upon the model; of an export, its name in it."
    ),
]
FloatName = Literal["auto", "float32", "bfloat16", "float16"]
Dtype = Annotated[
    FloatName, typer.Option("--dtype", help="Float dtype to write; auto keeps each tensor's own.")
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu|cuda|cuda:N",
        help="What computes; the bytes that are written are the same.",
    ),
]  # fmt: skip
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Take these tensors instead; repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="GLOB", help="Leave these tensors alone; repeatable."),
]
RanksAllowed = Annotated[
    str | None,
    typer.Option(
        "--ranks-allowed", metavar="8,16,...", help="Ranks that the result's modules may have."
    ),
]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="SHARE", help="Keep this share of the change's energy."),
]
Rank = Annotated[int | None, typer.Option("--rank", help="Ranks up to this one.")]
Runtime = Annotated[
    Literal["auto", "transformers", "onnxruntime", "genai", "llamacpp"],
    typer.Option("--runtime", show_default="what the directory is for", help="What runs it."),
]
AllowUnmatched = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-unmatched", metavar="PATTERN",
        help="Adapter parts that may belong to nothing in the base; repeatable.",
    ),
]  # fmt: skip
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", "-c", metavar="FILE", callback=use_config, is_eager=True,
        help="Options from a YAML file; flags win.",
    ),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Printing:
    """What a command says, and where."""

    json: Annotated[bool, typer.Option("--json", help="Print JSON alone.")] = False
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write the JSON there too.")
    ] = None
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="A line for each tensor, not for each layer.")
    ] = False
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no table.")] = (
        False
    )
    config: Config = None


@dataclass(frozen=True, slots=True)
class Writing:
    """Where an operation writes, and how it runs."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Directory to write.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run ended.")
    ] = False
    durable: Annotated[
        bool, typer.Option("--durable", help="Wait until the disk has everything (fsync).")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute the report, write nothing.")
    ] = False
    max_shard_size: Annotated[
        int,
        typer.Option(
            "--max-shard-size", metavar="SIZE", parser=size, show_default="5GB",
            help="Largest file to write.",
        ),
    ] = 5_000_000_000  # fmt: skip
    max_memory: Annotated[
        int | None,
        typer.Option(
            "--max-memory", metavar="SIZE", parser=size, help="Bound on the tiles in memory."
        ),
    ] = None
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Threads; 0 takes every processor.")
    ] = 0


@dataclass(frozen=True, slots=True)
class WritingAdapter:
    """Where an adapter is written, and how."""

    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Directory to write.")
    ] = None
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False
    durable: Annotated[
        bool, typer.Option("--durable", help="Wait until the disk has everything (fsync).")
    ] = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Compute the report, write nothing.")
    ] = False
    dialect: Annotated[
        str | None,
        typer.Option(
            "--dialect", show_default="the input's, if it can be", help="The layout to write."
        ),
    ] = None
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Float dtype of the factors."),
    ] = "float32"
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=0, help="Threads; 0 takes every processor.")
    ] = 0

    @property
    def run(self) -> Writing:
        """The part that says how to run."""
        return Writing(
            self.output, self.overwrite, durable=self.durable, dry_run=self.dry_run, jobs=self.jobs
        )


@dataclass(frozen=True, slots=True)
class Calibrating:
    """The text that shows what a module's inputs are."""

    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", metavar="TEXT", exists=True, dir_okay=False,
            help="Weigh by the inputs that modules get on this file, UTF-8; transformers runs --base.",
        ),
    ] = None  # fmt: skip
    window: Annotated[
        int, typer.Option("--window", min=2, help="Tokens of TEXT that are seen at once.")
    ] = 512
    tokens: Annotated[
        int, typer.Option("--tokens", min=2, help="Tokens of TEXT, from its start.")
    ] = 8192

    @property
    def calibration(self) -> Calibration | None:
        """None where no text is given."""
        from lorasurgery.operations.activations.calibration import Calibration

        return Calibration(self.calibrate, self.window, self.tokens) if self.calibrate else None


def refuse_flags(path: Path, writing: Writing, given: Mapping[str, object]) -> None:
    """Raise UsageError for a flag that means nothing to an ONNX file."""
    how = {
        "--resume": writing.resume, "--durable": writing.durable, "--max-memory": writing.max_memory,
    }  # fmt: skip
    if named := [flag for flag, value in {**given, **how}.items() if value]:
        raise UsageError(
            f"{named[0]}: means nothing to an ONNX file, and {path} is one. Take it away."
        )


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters of dataclass type are replaced by the fields of those."""
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        group = hints[name]
        if isinstance(group, type) and is_dataclass(group):
            groups[name] = group
            parameters += _fields(group)
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(parameter.replace(kind=kind, annotation=hints[name]))

    @wraps(command)
    def flat(**values: Any) -> None:
        grouped = {
            name: kind(**{f.name: values.pop(f.name) for f in fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **grouped)

    # what typer looks at
    del flat.__wrapped__
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in parameters}
    return flat


def _fields(kind: type) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY,
            default=field.default, annotation=hints[field.name],
        )
        for field in fields(kind)
    ]  # fmt: skip
