"""Perplexity of a model on a text, and how far two models' next-token distributions are apart.

perplexity = exp(mean -log p(token | those before it in its window)); KL(A || B) in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError
from lorasurgery.operations._language_model import LanguageModel, load, windows

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`other` and what follows are None where one model was looked at."""

    model: str
    tokens: int  # that were predicted
    perplexity: float
    other: str | None = None
    other_perplexity: float | None = None
    divergence: float | None = None  # mean KL(model || other), nats
    agreement: float | None = None  # share of tokens at which both have the same first choice


def evaluate(
    model: Path, other: Path | None, text: str, window: int = 512, progress: Progress | None = None
) -> Evaluation:
    """Walk through the text in windows without overlap; each window's first token is given.

    Raises FormatError for a text of less than two tokens, or two models of different vocabularies.
    """
    one = load(model)
    two = load(other) if other else None
    tokens = one.encode(text)
    if len(tokens) < 2:
        raise FormatError(
            f"the text is {len(tokens)} tokens long: nothing can be predicted. Give more."
        )
    if two and two.model.config.vocab_size != one.model.config.vocab_size:
        raise FormatError(
            f"{other}: has {two.model.config.vocab_size} tokens, {model} "
            f"{one.model.config.vocab_size}: their distributions cannot be compared."
        )
    sums = _Sums()
    for start, part in windows(tokens, window):
        _add(sums, one, two, part)
        if progress:
            progress(start + len(part), len(tokens), model.name)
    return _result(sums, model, other)


@dataclass(slots=True)
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    other_loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0


def _add(sums: _Sums, one: LanguageModel, two: LanguageModel | None, part: Tensor) -> None:
    logs = one.logits(part)[:-1].log_softmax(-1)
    sums.tokens += len(part) - 1
    sums.loss -= float(logs.gather(1, part[1:, None]).double().sum())
    if two is None:
        return
    other = two.logits(part)[:-1].log_softmax(-1)
    sums.other_loss -= float(other.gather(1, part[1:, None]).double().sum())
    sums.divergence += float((logs.exp() * (logs - other)).double().sum())
    sums.agreeing += int((logs.argmax(-1) == other.argmax(-1)).sum())


def _result(sums: _Sums, model: Path, other: Path | None) -> Evaluation:
    perplexity = math.exp(sums.loss / sums.tokens)
    if other is None:
        return Evaluation(str(model), sums.tokens, perplexity)
    return Evaluation(
        str(model), sums.tokens, perplexity, str(other), math.exp(sums.other_loss / sums.tokens),
        sums.divergence / sums.tokens, sums.agreeing / sums.tokens,
    )  # fmt: skip
