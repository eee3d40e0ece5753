"""lorasurgery evaluate: did the operation harm the model?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasurgery.cli._options import Adapter, Base, Printing, Runtime
from lorasurgery.cli._print import emit, pairs
from lorasurgery.cli._progress import progress_bar
from lorasurgery.errors import UsageError

if TYPE_CHECKING:
    from lorasurgery.operations.evaluate import Evaluation
    from lorasurgery.operations.evaluate_encoder import Likeness


def command(
    model: Base,
    other: Annotated[
        str | None, typer.Argument(help="A second model, to compare the distributions of both.")
    ] = None,
    text: Annotated[
        Path, typer.Option("--text", metavar="FILE", exists=True, help="What to predict, UTF-8.")
    ] = ...,  # type: ignore[assignment]
    adapter: Adapter = None,
    window: Annotated[
        int, typer.Option("--window", min=2, help="Tokens that are seen at once.")
    ] = 512,
    runtime: Runtime = "auto",
    *,
    printing: Printing,
) -> None:
    """Perplexity of a model on a text, or how far two are apart.

    Each runs in what it is for: transformers (in float32), onnxruntime-genai or onnxruntime, on the CPU. Two
    encoders are compared by what they make of each line of the text.

    Example:

        lorasurgery evaluate base merged --text book.txt
        lorasurgery evaluate base --adapter my-lora --text book.txt
        lorasurgery evaluate base exported-int4 --text book.txt
        lorasurgery evaluate encoder encoder-nf4/model.onnx --text lines.txt
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.evaluate import evaluate
    from lorasurgery.operations.evaluate_encoder import compare_encoders
    from lorasurgery.operations.running.encoder import is_encoder, load_encoder
    from lorasurgery.operations.running.model import load

    content = text.read_text(encoding="utf-8")
    if is_encoder(resolve(model)):
        if other is None:
            raise UsageError(
                f"{model}: is an encoder, which predicts no text. Name another beside it."
            )
        one = load_encoder(resolve(model), runtime, adapter)
        two = load_encoder(resolve(other), runtime)
        with progress_bar(quiet=printing.quiet) as progress:
            likeness = compare_encoders(one, two, content, window, progress)
        emit(asdict(likeness), lambda: "\n".join(pairs(list(_likeness(likeness)))), printing)
        return
    first = load(resolve(model), runtime, adapter)
    second = load(resolve(other), runtime) if other else None
    with progress_bar(quiet=printing.quiet) as progress:
        found = evaluate(first, second, content, window, progress)
    emit(asdict(found), lambda: "\n".join(pairs(list(_lines(found)))), printing)


def _lines(found: Evaluation) -> Iterable[tuple[str, str]]:
    yield "tokens", str(found.tokens)
    yield f"perplexity of {found.model} ({found.runtime})", f"{found.perplexity:.3f}"
    if found.other_perplexity is None or found.divergence is None or found.agreement is None:
        return
    yield f"perplexity of {found.other} ({found.other_runtime})", f"{found.other_perplexity:.3f}"
    yield "KL divergence, nats per token", f"{found.divergence:.5f}"
    yield "same first choice", f"{100 * found.agreement:.2f} %"


def _likeness(found: Likeness) -> Iterable[tuple[str, str]]:
    yield "texts", str(found.texts)
    yield "model", f"{found.model} ({found.runtime})"
    yield "other", f"{found.other} ({found.other_runtime})"
    yield "cosine of their outputs, mean", f"{found.cosine:.6f}"
    yield "worst", f"{found.worst:.6f}, of {found.worst_text[:60]!r}"
