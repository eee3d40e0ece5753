"""A directory with genai_config.json in onnxruntime-genai (extra `genai`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.operations.running.model import load_tokenizer

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_ON = "on"


@dataclass(slots=True)
class ByGenai:
    """`model` is onnxruntime-genai's own."""

    path: Path
    model: Any
    tokenizer: Any
    vocabulary: int
    adapters: Any = None  # genai's set of one, which is on
    runtime: str = "onnxruntime-genai"

    @property
    def name(self) -> str:
        return str(self.path)

    def logits(self, tokens: Array) -> Array:
        import numpy as np

        scores: Array = np.asarray(self._begun(tokens, 1).get_output("logits")[0], np.float32)
        return scores

    def complete(self, tokens: Array, count: int) -> Array:
        import numpy as np

        generator = self._begun(tokens, count)
        made: list[int] = []
        while not generator.is_done() and len(made) < count:
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        return np.array(made, np.int64)

    def _begun(self, tokens: Array, more: int) -> Any:
        import numpy as np
        import onnxruntime_genai as genai

        how = genai.GeneratorParams(self.model)
        how.set_search_options(max_length=len(tokens) + more, do_sample=False)
        generator = genai.Generator(self.model, how)
        if self.adapters is not None:
            generator.set_active_adapter(self.adapters, _ON)
        generator.append_tokens(tokens.astype(np.int32))
        return generator


def load(path: Path, adapter: Path | None = None) -> ByGenai:
    """Raises FormatError for what onnxruntime-genai cannot load."""
    import json

    import onnxruntime_genai as genai

    from lorasurgery.export._onnx_decoder import GENAI_CONFIG

    try:
        config = json.loads((path / GENAI_CONFIG).read_bytes())
        model = genai.Model(str(path))
        adapters = genai.Adapters(model) if adapter else None
        if adapters is not None:
            adapters.load(str(adapter), _ON)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: onnxruntime-genai cannot load it ({reason}).") from None
    size = int(config["model"]["vocab_size"])
    return ByGenai(path, model, load_tokenizer(path), size, adapters)
