"""lorasurgery train: an adapter, by any method of the family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorasurgery.cli._method_flags import MethodFlags, own_options
from lorasurgery.cli._options import Base, Printing, Writing
from lorasurgery.cli._progress import no_bar
from lorasurgery.cli._report import carry_out
from lorasurgery.cli._sizes import size
from lorasurgery.cli._training_view import beside, draw_curves, explained, training_view

if TYPE_CHECKING:
    from lorasurgery.surgery import Report, RunOptions
    from lorasurgery.training.method import Group


@dataclass(frozen=True, slots=True)
class What:
    """What is adapted, and how large the adapter is."""

    rank: Annotated[
        int | None, typer.Option("--rank", "-r", min=1, show_default="the method's", help="r.")
    ] = None
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", show_default="2 r", help="The change is scaled by alpha / r."),
    ] = None
    dropout: Annotated[
        float, typer.Option("--dropout", min=0.0, max=0.99, help="Of what the detours see.")
    ] = 0.0
    target_modules: Annotated[
        list[str] | None,
        typer.Option(
            "--target-modules",
            metavar="NAME",
            show_default="all linear layers but the head",
            help="Ends of module paths, or one regular expression; repeatable.",
        ),
    ] = None
    exclude_modules: Annotated[
        list[str] | None,
        typer.Option("--exclude-modules", metavar="NAME", help="Leave these out; repeatable."),
    ] = None
    layers: Annotated[
        list[int] | None, typer.Option("--layers", help="These layers alone; repeatable.")
    ] = None
    modules_to_save: Annotated[
        list[str] | None,
        typer.Option("--modules-to-save", metavar="NAME", help="Train these whole; repeatable."),
    ] = None


@dataclass(frozen=True, slots=True)
class How:
    """How long, and how fast."""

    steps: Annotated[
        int | None, typer.Option("--steps", min=0, help="Optimizer steps, whatever --epochs says.")
    ] = None
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the data.")] = 1.0
    batch: Annotated[
        int, typer.Option("--batch", min=1, help="Examples that are seen at once.")
    ] = 4
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Batches in an optimizer step.")
    ] = 1
    lr: Annotated[
        float | None, typer.Option("--lr", show_default="the method's", help="Learning rate.")
    ] = None
    weight_decay: Annotated[float, typer.Option("--weight-decay")] = 0.0
    warmup: Annotated[
        float,
        typer.Option("--warmup", help="Steps in which the rate rises; below 1, a share of all."),
    ] = 0.0
    schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        typer.Option("--schedule", help="After the warm-up."),
    ] = "linear"
    clip: Annotated[
        float,
        typer.Option("--clip", min=0.0, help="Norm of the gradient, at most; 0: whatever it is."),
    ] = 1.0
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, paged-adamw, sgd.")] = (
        "adamw"
    )
    state_budget: Annotated[
        int | None,
        typer.Option(
            "--state-budget",
            parser=size,
            metavar="SIZE",
            show_default="all of it",
            help="paged-adamw: of its state in memory; the rest is in a file, or a GPU's in the host.",
        ),
    ] = None
    beta2: Annotated[float, typer.Option("--beta2", help="AdamW's.")] = 0.999
    seed: Annotated[int, typer.Option("--seed", help="Of factors, order and dropout.")] = 0


@dataclass(frozen=True, slots=True)
class Kept:
    """What is held out, and what is saved on the way."""

    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data", metavar="FILE", help="Held out; the best state of it is written."
        ),
    ] = None
    eval_every: Annotated[
        int | None, typer.Option("--eval-every", min=1, help="Steps; always after the last one.")
    ] = None
    patience: Annotated[
        int | None,
        typer.Option("--patience", min=1, help="Evaluations without a better one, then stop."),
    ] = None
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps.")] = 50


@dataclass(frozen=True, slots=True)
class Seen:
    """How data is read, and where numbers live."""

    length: Annotated[
        int, typer.Option("--length", min=2, help="Tokens of an example, at most.")
    ] = 512
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            metavar="LABEL",
            help="Classify {text, label} as these, in this order; repeatable.",
        ),
    ] = None
    pack: Annotated[bool, typer.Option("--pack", help="Put short examples into one row.")] = False
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option("--dtype", help="Of the base.")
    ] = "float32"
    bf16: Annotated[bool, typer.Option("--bf16", help="Multiply in bfloat16 (autocast).")] = False
    qlora: Annotated[
        bool,
        typer.Option("--qlora", help="Linear weights in NF4, as they are stored or packed now."),
    ] = False
    block_size: Annotated[
        int,
        typer.Option("--block-size", help="Weights that share a scale, if they are packed now."),
    ] = 64
    double_quant: Annotated[
        bool,
        typer.Option("--double-quant/--no-double-quant", help="Pack the scales as well, likewise."),
    ] = True
    checkpointing: Annotated[
        bool,
        typer.Option("--checkpointing", help="Compute activations again instead of keeping them."),
    ] = False
    mem_report: Annotated[
        bool,
        typer.Option("--mem-report", help="Say what a forward pass keeps for the backward pass."),
    ] = False
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")] = "auto"
    dialect: Annotated[
        str | None,
        typer.Option("--dialect", show_default="PEFT's, if it can be", help="The layout to write."),
    ] = None


def command(
    base: Base,
    data: Annotated[
        list[str],
        typer.Option("--data", metavar="FILE|DIR|HUB", help=".txt or .jsonl; repeatable."),
    ],
    method: Annotated[
        str, typer.Option("--method", "-m", help="lora, lora+, dora, vera, ...")
    ] = "lora",
    explain_optimizer: Annotated[
        bool, typer.Option("--explain-optimizer", help="Print the groups, with their rates.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            show_default="curves.png in DIR, if matplotlib is there",
            help="Draw losses and rates.",
        ),
    ] = None,
    *,
    what: What,
    how: How,
    own: MethodFlags,
    kept: Kept,
    seen: Seen,
    writing: Writing,
    printing: Printing,
) -> None:
    """Train an adapter on a frozen model.

    A line of a .jsonl file is {"text"}, {"prompt", "completion"}, or {"messages"} for the chat template; the
    loss is on answers alone.

    Example:

        lorasurgery train org/model --data chats.jsonl -o adapter --method dora --rank 16
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.inspecting.picture import check_file
    from lorasurgery.training.train import train

    options = train_options(base, data, method, (what, how, own_options(method, own), kept, seen))
    if plot:
        check_file(plot)
    source = resolve(base)
    groups: list[Group] = []

    def run(output: Path | None, running: RunOptions) -> Report:
        with training_view(quiet=printing.quiet) as watch:
            done = train(source, output, replace(options, watch=watch), running)
        if output and not beside():
            draw_curves(output, plot)
        groups.extend(done.groups)
        return done.report

    if beside():
        printing = replace(printing, json=False, report=None, quiet=True)
    carry_out(run, writing, printing, no_bar)
    if explain_optimizer and not beside():
        typer.echo("\n".join(explained(groups)), err=printing.json)


def train_options(
    base: str, data: list[str], method: str, given: tuple[What, How, Any, Kept, Seen]
) -> Any:
    """TrainOptions of the flags; `own` are the method's, or None."""
    from lorasurgery.codec import CodecOptions
    from lorasurgery.training.attach import Targets
    from lorasurgery.training.examples import Reading
    from lorasurgery.training.method import Wanted
    from lorasurgery.training.optimizer import Settings
    from lorasurgery.training.options import Held, Machine, Pace, TrainOptions

    what, how, own, kept, seen = given
    nf4 = CodecOptions(seen.block_size, seen.double_quant) if seen.qlora else None
    return TrainOptions(
        method,
        tuple(data),
        base,
        Wanted(what.rank, what.alpha, what.dropout, seed=how.seed),
        own,
        Targets(
            tuple(what.target_modules or ()),
            tuple(what.exclude_modules or ()),
            tuple(what.layers or ()),
            tuple(what.modules_to_save or ()),
        ),
        Reading(seen.length, seen.pack, tuple(seen.classes) if seen.classes else None),
        Pace(
            how.steps, how.epochs, how.batch, how.accumulate, how.lr, how.weight_decay, how.warmup,
            how.schedule, how.clip or None, how.optimizer, Settings((0.9, how.beta2), budget=how.state_budget),
        ),
        Held(tuple(kept.eval_data or ()), kept.eval_every, kept.patience, kept.save_every),
        Machine(seen.dtype, seen.device, seen.bf16, seen.checkpointing, nf4, seen.mem_report),
        seen.dialect,
    )  # fmt: skip
