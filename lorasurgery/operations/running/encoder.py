"""An encoder in the runtime that it is for: one vector for each text.

States of tokens are averaged, or the first is taken, as sentence-transformers' 1_Pooling/config.json says; an output
that has no tokens (a classifier's logits) is the vector itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError, UsageError
from lorasurgery.export._onnx_adapter_files import find_adapter
from lorasurgery.export._onnx_session import PAST, Switched, open_session, switched_on
from lorasurgery.formats.onnx import File
from lorasurgery.model import open_model, resolve

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_TYPES = ("bert", "distilbert", "roberta")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
# what goes on with a text, whatever its model type
_WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass
class Encoder:
    """`run` takes tokens by their inputs' names, int64 [texts, length], and gives the first output."""

    path: Path
    name: str
    runtime: str
    inputs: Sequence[str]
    run: Any

    @cached_property
    def tokenizer(self) -> Any:
        from lorasurgery.operations.running.model import load_tokenizer

        return load_tokenizer(_folder(self.path))

    def vectors(self, tokens: Mapping[str, Array]) -> Array:
        """float64 [texts, width]."""
        import numpy as np

        found: Array = self.run({name: tokens[name] for name in self.inputs}).astype(np.float64)
        if found.ndim != 3:
            flat: Array = found.reshape(len(found), -1)
            return flat
        if _first_token(_folder(self.path)):
            first: Array = found[:, 0]
            return first
        mask = tokens["attention_mask"][..., None]
        vectors: Array = (found * mask).sum(axis=1) / mask.sum(axis=1)
        return vectors


def is_encoder(path: Path) -> bool:
    """Told from config.json, and of a graph by its inputs; no weight is read."""
    config = _json(_folder(path) / "config.json")
    architectures = config.get("architectures") or [""]
    if architectures[0].endswith(_WRITERS):
        return False
    file = _graph(path)
    if file is None:
        return config.get("model_type") in _TYPES
    inputs = File(file).header.inputs
    return "input_ids" in inputs and not any(map(PAST.fullmatch, inputs))


def load_encoder(path: Path, runtime: str = "auto", adapter: str | None = None) -> Encoder:
    """With an adapter switched on that was exported with it, or laid upon a directory.

    Raises UsageError for a runtime that runs no encoders, FormatError for what is none or cannot be loaded.
    """
    if not is_encoder(path):
        raise FormatError(f"{path}: is no encoder, and the other is. Compare like with like.")
    file = _graph(path)
    fits = ("auto", "transformers") if file is None else ("auto", "onnxruntime")
    if runtime not in fits:
        raise UsageError(f"--runtime {runtime}: {path} is an encoder for {fits[1]}. Take it away.")
    return _by_transformers(path, adapter) if file is None else _by_onnxruntime(path, file, adapter)


def _by_onnxruntime(path: Path, file: Path, adapter: str | None) -> Encoder:
    on: Switched | None = switched_on(find_adapter(_folder(path), adapter)) if adapter else None
    session = open_session(file)
    inputs = [i.name for i in session.get_inputs()]
    optional = {i.name for i in session.get_overridable_initializers()}
    strange = [name for name in inputs if name not in _INPUTS and name not in optional]
    if strange:
        raise FormatError(
            f"{file}: takes {strange[0]}, which no tokenizer gives ({', '.join(_INPUTS)}). Look into it "
            "with `inspect`."
        )

    def run(feeds: dict[str, Array]) -> Array:
        found: Array = session.run(None, feeds, on.options if on else None)[0]
        return found

    name = f"{path} + {adapter}" if adapter else str(path)
    return Encoder(path, name, "onnxruntime", [n for n in inputs if n in _INPUTS], run)


def _by_transformers(path: Path, adapter: str | None) -> Encoder:
    import inspect

    from lorasurgery.operations import _language_model

    laid = resolve(adapter) if adapter else None
    packed = bool(open_model(path).weights.packed)
    model = _language_model.load_encoder(path, laid, packed=packed).eval()
    known = inspect.signature(model.forward).parameters

    def run(feeds: dict[str, Array]) -> Array:
        import torch

        with torch.inference_mode():
            found: Array = model(**{k: torch.from_numpy(v) for k, v in feeds.items()})[0].numpy()
        return found

    name = f"{path} + {laid}" if laid else str(path)
    return Encoder(path, name, "transformers", [n for n in _INPUTS if n in known], run)


def _graph(path: Path) -> Path | None:
    file = path if path.suffix == ".onnx" else path / "model.onnx"
    return file if file.is_file() else None


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _first_token(folder: Path) -> bool:
    return bool(_json(folder / "1_Pooling" / "config.json").get("pooling_mode_cls_token"))


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_bytes()) if file.is_file() else {}
    return content if isinstance(content, dict) else {}
