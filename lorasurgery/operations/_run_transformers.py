"""A model directory in transformers (extra `train`), in float32 on the CPU or in the dtype asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.operations._language_model import load_tokenizer

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


@dataclass(slots=True)
class ByTransformers:
    """`model` is transformers' own."""

    path: Path
    model: Any
    tokenizer: Any
    runtime: str = "transformers"

    @property
    def vocabulary(self) -> int:
        return int(self.model.config.vocab_size)

    def logits(self, tokens: Array) -> Array:
        import torch

        with torch.inference_mode():
            scores: Array = self.model(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
        return scores

    def complete(self, tokens: Array, count: int) -> Array:
        import torch

        given = torch.from_numpy(tokens)[None]
        made = self.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
        )
        new: Array = made[0, len(tokens) :].numpy()
        return new


def load(path: Path, dtype: str = "float32") -> ByTransformers:
    """Raises FormatError for what transformers cannot load."""
    if not (path / "config.json").is_file():
        raise FormatError(f"{path}: no config.json in it, so that no model can be built. Name one.")
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: transformers cannot load it ({reason}).") from None
    return ByTransformers(path, model, load_tokenizer(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and notes of transformers' own."""
    from transformers.utils import logging as their_logging

    logging: Any = their_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
