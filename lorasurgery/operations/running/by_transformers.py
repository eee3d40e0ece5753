"""A model directory in transformers, an adapter of any variant beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.operations import _language_model

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


@dataclass(slots=True)
class ByTransformers:
    """The loaded model, asked in numpy."""

    loaded: _language_model.LanguageModel
    runtime: str = "transformers"

    @property
    def path(self) -> Path:
        return self.loaded.path

    @property
    def name(self) -> str:
        return self.loaded.name

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def vocabulary(self) -> int:
        return int(self.loaded.model.config.vocab_size)

    def logits(self, tokens: Array) -> Array:
        import torch

        scores: Array = self.loaded.logits(torch.from_numpy(tokens)).numpy()
        return scores

    def complete(self, tokens: Array, count: int) -> Array:
        import torch

        given = torch.from_numpy(tokens)[None]
        made = self.loaded.model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
        )
        new: Array = made[0, len(tokens) :].numpy()
        return new


def load(path: Path, adapter: Path | None = None) -> ByTransformers:
    """Raises FormatError for what transformers cannot load."""
    return ByTransformers(_language_model.load(path, adapter=adapter))
