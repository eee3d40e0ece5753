"""Perplexity of a model on a text, and how far two models' next-token distributions are apart.

perplexity = exp(mean -log p(token | those before it in its window)); KL(A || B) in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorasurgery.errors import FormatError
from lorasurgery.operations.running.model import LanguageModel, encode

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_ROWS = 32  # of float64 scores at a time

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`other` and what follows are None where one model was looked at."""

    model: str
    runtime: str
    tokens: int  # that were predicted
    perplexity: float
    other: str | None = None
    other_runtime: str | None = None
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

    Each model runs in the runtime that it is for, on the tokens of the first one's tokenizer.
    Raises FormatError for a text of less than two tokens, or two models of different vocabularies.
    """
    tokens = encode(one, text)
    if len(tokens) < 2:
        raise FormatError(
            f"the text is {len(tokens)} tokens long: nothing can be predicted. Give more."
        )
    if two and two.vocabulary != one.vocabulary:
        raise FormatError(
            f"{two.path}: has {two.vocabulary} tokens, {one.path} {one.vocabulary}: their distributions "
            "cannot be compared."
        )
    sums = _Sums()
    for start, part in _windows(tokens, window):
        _add(sums, one, two, part)
        if progress:
            progress(start + len(part), len(tokens), one.path.name)
    return _result(sums, one, two)


@dataclass(slots=True)
class _Sums:
    tokens: int = 0
    loss: float = 0.0
    other_loss: float = 0.0
    divergence: float = 0.0
    agreeing: int = 0


def _windows(tokens: Array, window: int) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window]
        if len(part) > 1:
            yield start, part


def _add(sums: _Sums, one: LanguageModel, two: LanguageModel | None, part: Array) -> None:
    import numpy as np

    scores = one.logits(part)[:-1]
    others = two.logits(part)[:-1] if two else None
    sums.tokens += len(part) - 1
    for start in range(0, len(scores), _ROWS):
        rows, came = slice(start, start + _ROWS), part[1:][start : start + _ROWS, None]
        logs = _log_softmax(scores[rows])
        sums.loss -= float(np.take_along_axis(logs, came, 1).sum())
        if others is None:
            continue
        other = _log_softmax(others[rows])
        sums.other_loss -= float(np.take_along_axis(other, came, 1).sum())
        sums.divergence += float((np.exp(logs) * (logs - other)).sum())
        sums.agreeing += int((logs.argmax(-1) == other.argmax(-1)).sum())


def _log_softmax(scores: Array) -> Array:
    """In float64: differences of distributions that are near are small."""
    import numpy as np

    wide = scores.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    logs: Array = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return logs


def _result(sums: _Sums, one: LanguageModel, two: LanguageModel | None) -> Evaluation:
    perplexity = math.exp(sums.loss / sums.tokens)
    if two is None:
        return Evaluation(one.name, one.runtime, sums.tokens, perplexity)
    return Evaluation(
        one.name, one.runtime, sums.tokens, perplexity, two.name, two.runtime,
        math.exp(sums.other_loss / sums.tokens), sums.divergence / sums.tokens,
        sums.agreeing / sums.tokens,
    )  # fmt: skip
