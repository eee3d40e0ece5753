"""A model directory as transformers runs it (extra `train`): its next-token scores, its greedy text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.codec import CodecOptions
from lorasurgery.errors import FormatError, UsageError
from lorasurgery.model import open_model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """transformers' model and tokenizer, in float32 on the CPU or in the dtype asked for."""

    path: Path
    model: Any
    tokenizer: Any
    adapter: Path | None = None  # laid upon it, not merged

    @property
    def name(self) -> str:
        """What it is made of."""
        return f"{self.path} + {self.adapter}" if self.adapter else str(self.path)

    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [length] -> float32 [length, vocabulary]."""
        import torch

        with torch.inference_mode():
            scores: Tensor = self.model(tokens[None]).logits[0].float()
        return scores

    def encode(self, text: str) -> Tensor:
        """Text as tokens int64 [length], without those that a model puts around it."""
        tokens: Tensor = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)[
            "input_ids"
        ][0]
        return tokens


def load(
    path: Path,
    dtype: str = "float32",
    adapter: Path | None = None,
    classes: Sequence[str] | None = None,
    nf4: CodecOptions | None = None,
) -> LanguageModel:
    """With an adapter beside it, if one is given; with `classes`, as a classifier of sequences.

    `nf4`: linear weights that are not NF4 become it.

    Raises UsageError where the extra is missing, FormatError for what transformers cannot load, and
    what an adapter that does not fit raises.
    """
    if find_spec("transformers") is None:
        raise UsageError(
            "transformers runs the model, and is not installed. Run `pip install lorasurgery[train]`."
        )
    if not (path / "config.json").is_file():
        raise FormatError(f"{path}: no config.json in it, so that no model can be built. Name one.")
    import torch
    from transformers import AutoTokenizer

    try:
        with _quiet():
            kind, more = _kind(classes)
            if nf4 or (adapter and open_model(path).weights.packed):
                from lorasurgery.training.nf4.load import load as load_nf4

                model = load_nf4(path, getattr(torch, dtype), nf4 or CodecOptions(), kind, more)
            else:
                model = kind.from_pretrained(path, dtype=getattr(torch, dtype), **more)
            tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: transformers cannot load it ({reason}).") from None
    if adapter is not None:
        from lorasurgery.training.live import add_adapter

        add_adapter(model, path, adapter)
    return LanguageModel(path, model, tokenizer, adapter)


def load_encoder(path: Path, adapter: Path | None = None, *, packed: bool = False) -> Any:
    """An encoder of its architecture's own class, in float32; `packed`: linear weights stay NF4.

    Raises UsageError where the extra is missing, FormatError for what transformers cannot load.
    """
    if find_spec("transformers") is None:
        raise UsageError(
            "transformers runs the model, and is not installed. Run `pip install lorasurgery[train]`."
        )
    import torch
    import transformers

    try:
        with _quiet():
            config = transformers.AutoConfig.from_pretrained(path)
            names = [n for n in config.architectures or () if hasattr(transformers, n)]
            kind = getattr(transformers, names[0]) if names else transformers.AutoModel
            if packed:
                from lorasurgery.training.nf4.load import load as load_nf4

                model = load_nf4(path, torch.float32, CodecOptions(), kind)
            else:
                model = kind.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: transformers cannot load it ({reason}).") from None
    if adapter is not None:
        from lorasurgery.training.live import add_adapter

        add_adapter(model, path, adapter)
    return model


def windows(tokens: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """(where it starts, tokens) of windows without overlap; what follows alone in the last is left out."""
    for start in range(0, len(tokens) - 1, size):
        part = tokens[start : start + size]
        if len(part) > 1:
            yield start, part


def _kind(classes: Sequence[str] | None) -> tuple[Any, dict[str, Any]]:
    """transformers' class, and what it must be told."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if classes is None:
        return AutoModelForCausalLM, {}
    return AutoModelForSequenceClassification, {"num_labels": len(classes)}


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
