"""lorasurgery generate: greedy text of a model directory."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasurgery.cli._options import Adapter, Base, Printing
from lorasurgery.cli._print import emit


def command(
    model: Base,
    prompt: Annotated[list[str], typer.Argument(help="What the model is to go on with.")],
    adapter: Adapter = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt into the chat template.")
    ] = False,
    *,
    printing: Printing,
) -> None:
    """Greedy text of a model, by transformers.

    In float32 on the CPU; NF4 directories need bitsandbytes.

    Example:

        lorasurgery generate merged --chat "Who wrote Hamlet?"
        lorasurgery generate base --adapter my-lora "To be, or"
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations._language_model import load

    loaded = load(resolve(model), adapter=resolve(adapter) if adapter else None)
    answers = {text: loaded.complete(text, tokens, chat=chat) for text in prompt}
    emit({"model": model, "answers": answers}, lambda: "\n\n".join(answers.values()), printing)
