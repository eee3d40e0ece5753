"""Perplexity of a model on a text, and how far two models' next-token distributions are apart.

perplexity = exp(mean -log p(token | those before it in its window)); KL(A || B) in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError
from lorasurgery.operations._language_model import LanguageModel, windows

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
    one: LanguageModel,
    two: LanguageModel | None,
    text: str,
    window: int = 512,
    progress: Progress | None = None,
) -> Evaluation:
    """Walk through the text in windows without overlap; each window's first token is given.

    Raises FormatError for a text of less than two tokens, or two models of different vocabularies.
    """
    tokens = one.encode(text)
    if len(tokens) < 2:
        raise FormatError(
            f"the text is {len(tokens)} tokens long: nothing can be predicted. Give more."
        )
    if two and two.model.config.vocab_size != one.model.config.vocab_size:
        raise FormatError(
            f"{two.path}: has {two.model.config.vocab_size} tokens, {one.path} "
            f"{one.model.config.vocab_size}: their distributions cannot be compared."
        )
    sums = _Sums()
    for start, part in windows(tokens, window):
        _add(sums, one, two, part)
        if progress:
            progress(start + len(part), len(tokens), one.path.name)
    return _result(sums, one.name, two.name if two else None)


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


def _result(sums: _Sums, model: str, other: str | None) -> Evaluation:
    perplexity = math.exp(sums.loss / sums.tokens)
    if other is None:
        return Evaluation(model, sums.tokens, perplexity)
    return Evaluation(
        model, sums.tokens, perplexity, other, math.exp(sums.other_loss / sums.tokens),
        sums.divergence / sums.tokens, sums.agreeing / sums.tokens,
    )  # fmt: skip
