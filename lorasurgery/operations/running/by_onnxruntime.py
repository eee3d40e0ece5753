"""A decoder's graph in plain onnxruntime, its keys and values handed on from token to token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.export._onnx_session import (
    PAST,
    Switched,
    config_of,
    empty_past,
    feeds,
    open_session,
    switched_on,
)
from lorasurgery.operations.running.model import load_tokenizer

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


@dataclass(slots=True)
class ByOnnxruntime:
    """`past` are the empty keys and values that a text begins with; `on` is the adapter that is on."""

    path: Path
    session: Any
    tokenizer: Any
    vocabulary: int
    past: Mapping[str, Array]
    end: frozenset[int]
    on: Switched | None = None
    runtime: str = "onnxruntime"

    @property
    def name(self) -> str:
        return str(self.path)

    def logits(self, tokens: Array) -> Array:
        return self._step(tokens, self.past, 0)[0]

    def complete(self, tokens: Array, count: int) -> Array:
        import numpy as np

        made: list[int] = []
        scores, past = self._step(tokens, self.past, 0)
        while len(made) < count:
            made.append(int(scores[-1].argmax()))
            if made[-1] in self.end or len(made) == count:
                break
            scores, past = self._step(np.array(made[-1:]), past, len(tokens) + len(made) - 1)
        return np.array(made, np.int64)

    def _step(
        self, tokens: Array, past: Mapping[str, Array], seen: int
    ) -> tuple[Array, dict[str, Array]]:
        """Scores [length, vocabulary] after `seen` tokens whose keys and values are in `past`."""
        import numpy as np

        how = self.on.options if self.on else None
        found = self.session.run(None, feeds(self.session, tokens, past, seen), how)
        outputs = dict(zip((o.name for o in self.session.get_outputs()), found, strict=True))
        scores: Array = outputs["logits"][0].astype(np.float32)
        return scores, {name: outputs[PAST.sub(r"present.\1.\2", name)] for name in past}


def load(path: Path, adapter: Path | None = None) -> ByOnnxruntime:
    """Raises FormatError for what onnxruntime cannot load, and for a graph that is no decoder."""
    file = path if path.suffix == ".onnx" else path / "model.onnx"
    folder = file.parent
    session = open_session(file)
    outputs = {o.name: o for o in session.get_outputs()}
    inputs = [i.name for i in session.get_inputs()]
    if "logits" not in outputs or not any(map(PAST.fullmatch, inputs)):
        raise FormatError(
            f"{file}: is no decoder with a cache: it makes {', '.join(list(outputs)[:3])} of "
            f"{', '.join(inputs[:3])}. Look into it with `inspect`."
        )
    config = config_of(folder)
    ends = config.get("eos_token_id")
    end = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
    last = outputs["logits"].shape[-1]
    vocabulary = last if isinstance(last, int) else int(config["vocab_size"])
    on = switched_on(adapter) if adapter else None
    past = empty_past(session, folder)
    return ByOnnxruntime(path, session, load_tokenizer(folder), vocabulary, past, end, on)
