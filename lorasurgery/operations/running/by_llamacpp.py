"""A GGUF file in llama.cpp (package llama-cpp-python), keys and values in float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.operations.running.model import gguf_of, load_tokenizer

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_LEAST = 512  # tokens that there is room for
_F32 = 0  # ggml's number of it


@dataclass(slots=True)
class ByLlamacpp:
    """`opened` is made anew for a longer text: llama.cpp takes the room for all scores beforehand."""

    path: Path
    file: Path
    tokenizer: Any
    vocabulary: int
    adapter: Path | None = None
    runtime: str = "llama.cpp"
    opened: dict[int, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.path} + {self.adapter}" if self.adapter else str(self.path)

    def logits(self, tokens: Array) -> Array:
        model = self._fed(tokens, len(tokens))
        scores: Array = model.scores[: len(tokens)].copy()
        return scores

    def complete(self, tokens: Array, count: int) -> Array:
        import llama_cpp
        import numpy as np

        model = self._fed(tokens, len(tokens) + count)
        vocabulary = llama_cpp.llama_model_get_vocab(model.model)
        made: list[int] = []
        while len(made) < count:
            made.append(int(model.scores[model.n_tokens - 1].argmax()))
            if llama_cpp.llama_vocab_is_eog(vocabulary, made[-1]) or len(made) == count:
                break
            model.eval(made[-1:])
        return np.array(made, np.int64)

    def _fed(self, tokens: Array, room: int) -> Any:
        size = max(_LEAST, 1 << (room - 1).bit_length())
        if size not in self.opened:
            self.opened.clear()
            self.opened[size] = _open(self.file, self.adapter, size)
        model = self.opened[size]
        model.reset()
        model.eval([int(token) for token in tokens])
        return model


def load(path: Path, adapter: Path | None = None) -> ByLlamacpp:
    """Raises FormatError for what llama.cpp cannot load."""
    file = gguf_of(path)
    if file is None:
        raise FormatError(f"{path}: is no GGUF file, and holds none. Export it --to gguf.")
    model = _open(file, adapter, _LEAST)
    tokenizer = load_tokenizer(file.parent)
    return ByLlamacpp(path, file, tokenizer, model.n_vocab(), adapter, opened={_LEAST: model})


def _open(file: Path, adapter: Path | None, size: int) -> Any:
    from llama_cpp import Llama

    try:
        return Llama(
            str(file), n_ctx=size, n_batch=size, logits_all=True, verbose=False, type_k=_F32, type_v=_F32,
            lora_path=str(adapter) if adapter else None,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{file}: llama.cpp cannot load it ({reason}).") from None
