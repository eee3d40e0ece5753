"""A model directory in transformers, an adapter of any variant beside it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.operations import _language_model
from lorasurgery.operations.convert_checkpoint import convert_checkpoint
from lorasurgery.operations.running.model import gguf_of
from lorasurgery.surgery import RunOptions

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
    """A GGUF file is decoded before. Raises FormatError for what transformers cannot load."""
    file = gguf_of(path)
    if file is None:
        return ByTransformers(_language_model.load(path, adapter=adapter))
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "decoded"
        convert_checkpoint(file, plain, "F32", RunOptions())
        loaded = _language_model.load(plain, adapter=adapter)
    return ByTransformers(replace(loaded, path=path), "transformers, from decoded GGUF")
