"""How far two encoders are apart: the cosine of what each makes of a text, line by line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.operations.running.encoder import Encoder

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_BATCH = 16
_POSITIONS = 512  # of BERT and its family, whatever the tokenizer says

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Likeness:
    """`cosine` is the mean over the texts; the worst is that of `worst_text`."""

    model: str
    runtime: str
    other: str
    other_runtime: str
    texts: int
    cosine: float
    worst: float
    worst_text: str


def compare_encoders(
    one: Encoder, two: Encoder, text: str, window: int = 512, progress: Progress | None = None
) -> Likeness:
    """Each line that is not empty is a text; it is cut after `window` tokens, or as many as there are positions.

    Raises FormatError for an empty text, and for outputs of different width.
    """
    import numpy as np

    texts = [line.strip() for line in text.splitlines() if line.strip()]
    if not texts:
        raise FormatError(
            "the text has no line that is not empty: nothing can be compared. Give more."
        )
    found: list[Array] = []
    for start in range(0, len(texts), _BATCH):
        tokens = _tokens(one, texts[start : start + _BATCH], window)
        a, b = one.vectors(tokens), two.vectors(tokens)
        if a.shape != b.shape:
            raise FormatError(
                f"{two.path}: makes {b.shape[1]} numbers of a text, {one.path} {a.shape[1]}: they cannot "
                "be compared."
            )
        lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        found.append((a * b).sum(axis=1) / np.maximum(lengths, np.finfo(np.float64).tiny))
        if progress:
            progress(min(start + _BATCH, len(texts)), len(texts), one.path.name)
    cosines = np.concatenate(found)
    worst = int(cosines.argmin())
    return Likeness(
        one.name, one.runtime, two.name, two.runtime, len(texts),
        float(cosines.mean()), float(cosines[worst]), texts[worst],
    )  # fmt: skip


def _tokens(model: Encoder, texts: Sequence[str], window: int) -> dict[str, Any]:
    import numpy as np

    most = min(window, model.tokenizer.model_max_length, _POSITIONS)
    found = model.tokenizer(
        list(texts), padding=True, truncation=True, max_length=most, return_tensors="np"
    )
    tokens = {name: value.astype(np.int64) for name, value in found.items()}
    tokens.setdefault("token_type_ids", np.zeros_like(tokens["input_ids"]))
    return tokens
