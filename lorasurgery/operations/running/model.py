"""A model as the runtime that it is for runs it: its next-token scores, its greedy text.

A directory with genai_config.json runs in onnxruntime-genai, or like any other model.onnx in onnxruntime; a GGUF
file in llama.cpp where it is installed; everything else runs in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lorasurgery.errors import FormatError, UsageError
from lorasurgery.export._onnx_adapter_files import FOLDER, find_adapter
from lorasurgery.export._onnx_decoder import GENAI_CONFIG
from lorasurgery.model import resolve
from lorasurgery.operations.running.encoder import is_encoder

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

RuntimeName = Literal["auto", "transformers", "onnxruntime", "genai", "llamacpp"]
_NEEDS: Mapping[str, tuple[str, str]] = {
    "transformers": ("transformers", "'lorasurgery[train]'"),
    "onnxruntime": ("transformers", "'lorasurgery[train]'"),
    "genai": ("onnxruntime_genai", "'lorasurgery[genai]'"),
    "llamacpp": ("llama_cpp", "llama-cpp-python"),
}  # fmt: skip


class LanguageModel(Protocol):
    """One model in one runtime, on the CPU."""

    @property
    def path(self) -> Path: ...
    @property
    def runtime(self) -> str: ...
    @property
    def name(self) -> str:
        """What it is made of."""
        ...

    @property
    def tokenizer(self) -> Any:
        """transformers' own: all runtimes are given its tokens."""
        ...

    @property
    def vocabulary(self) -> int:
        """How many scores there are for each token."""
        ...

    def logits(self, tokens: Array) -> Array:
        """Tokens int64 [length] -> float32 [length, vocabulary]."""
        ...

    def complete(self, tokens: Array, count: int) -> Array:
        """The greedy continuation of tokens int64 [length]: at most so many, ending before the end token."""
        ...


def load(path: Path, runtime: RuntimeName = "auto", adapter: str | None = None) -> LanguageModel:
    """The model, with an adapter switched on that was exported with it, or laid upon a directory.

    Raises UsageError where the extra is missing, FormatError for an encoder, and what the runtime cannot load.
    """
    if is_encoder(path):
        raise FormatError(
            f"{path}: is an encoder, which goes on with no text. See what it makes of one with "
            "`lorasurgery evaluate A B --text FILE`."
        )
    chosen = _runtime(path) if runtime == "auto" else runtime
    module, package = _NEEDS[chosen]
    if find_spec(module) is None:
        raise UsageError(
            f"{chosen} runs {path}, and {module} is not installed. Run `pip install {package}`."
        )
    if chosen == "transformers":
        from lorasurgery.operations.running.by_transformers import load as by_transformers

        return by_transformers(path, _beside(path, adapter) if adapter else None)
    if chosen == "llamacpp":
        from lorasurgery.operations.running.by_llamacpp import load as by_llamacpp

        return by_llamacpp(path, _beside(path, adapter) if adapter else None)
    file = find_adapter(path, adapter) if adapter else None
    if chosen == "onnxruntime":
        from lorasurgery.operations.running.by_onnxruntime import load as by_onnxruntime

        return by_onnxruntime(path, file)
    from lorasurgery.operations.running.by_genai import load as by_genai

    return by_genai(path, file)


def encode(model: LanguageModel, text: str) -> Array:
    """Text as tokens int64 [length], without those that a model puts around it."""
    import numpy as np

    return np.array(model.tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def answer(model: LanguageModel, prompt: str, count: int, *, chat: bool) -> str:
    """The greedy text after a prompt; `chat` puts the prompt into the template."""
    import numpy as np

    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = model.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
    given = np.array(model.tokenizer(prompt, add_special_tokens=not chat)["input_ids"], np.int64)
    if not len(given):
        raise FormatError("the prompt is empty: there is nothing to go on with. Give some words.")
    made = model.complete(given, count)
    return str(model.tokenizer.decode(made, skip_special_tokens=True)).strip()


def load_tokenizer(path: Path) -> Any:
    """transformers' tokenizer of a directory. Raises FormatError where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{path}: transformers cannot load its tokenizer ({reason}).") from None


def _beside(path: Path, adapter: str) -> Path:
    """An adapter by its name in an export, or by its own path."""
    home = path if path.is_dir() else path.parent
    named = (home / FOLDER / adapter, home / FOLDER / f"{adapter}.gguf")
    return next((found for found in named if found.exists()), None) or resolve(adapter)


def _runtime(path: Path) -> RuntimeName:
    if (path / GENAI_CONFIG).is_file():
        return "genai" if find_spec("onnxruntime_genai") else "onnxruntime"
    if path.suffix == ".onnx" or (path / "model.onnx").is_file():
        return "onnxruntime"
    if gguf_of(path) and find_spec("llama_cpp"):
        return "llamacpp"
    return "transformers"


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path names or holds, where it holds no other weights."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    file = path / "model.gguf"
    return file if file.is_file() else None
