"""lorasurgery generate: greedy text of a model, in the runtime that it is for."""

from __future__ import annotations

from typing import Annotated

import typer

from lorasurgery.cli._options import Adapter, Base, Printing, Runtime
from lorasurgery.cli._print import emit


def command(
    model: Base,
    prompt: Annotated[list[str], typer.Argument(help="What the model is to go on with.")],
    adapter: Adapter = None,
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="At most so many.")] = 64,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Put the prompt into the chat template.")
    ] = False,
    runtime: Runtime = "auto",
    *,
    printing: Printing,
) -> None:
    """Greedy text of a model: by transformers, onnxruntime-genai or onnxruntime.

    On the CPU, model directories in float32; NF4 directories need bitsandbytes.

    Example:

        lorasurgery generate merged --chat "Who wrote Hamlet?"
        lorasurgery generate base --adapter my-lora "To be, or"
    """
    from lorasurgery.model import resolve
    from lorasurgery.operations.running.model import answer, load

    loaded = load(resolve(model), runtime, adapter)
    answers = {text: answer(loaded, text, tokens, chat=chat) for text in prompt}
    found = {"model": model, "runtime": loaded.runtime, "answers": answers}
    emit(found, lambda: "\n\n".join(answers.values()), printing)
