"""onnxruntime's sessions on the CPU: what a graph is given to begin with, and which adapter is on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.errors import FormatError
from lorasurgery.export._onnx_decoder import GENAI_CONFIG

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def open_session(file: Path) -> Any:
    """Raises FormatError for what onnxruntime refuses."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as theirs

    refusals = (
        theirs.Fail, theirs.InvalidArgument, theirs.InvalidGraph, theirs.InvalidProtobuf,
        theirs.NoSuchFile, theirs.NotImplemented, theirs.RuntimeException,
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except refusals as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(f"{file}: onnxruntime cannot load it ({reason}).") from None


@dataclass(frozen=True, slots=True)
class Switched:
    """RunOptions with an adapter on, which they do not keep alive."""

    options: Any
    adapter: Any


def switched_on(file: Path) -> Switched:
    """The adapter of an .onnx_adapter file."""
    import onnxruntime

    on = Switched(onnxruntime.RunOptions(), onnxruntime.LoraAdapter())
    on.adapter.Load(str(file))
    on.options.add_active_adapter(on.adapter)
    return on


def feeds(session: Any, tokens: Array, past: Mapping[str, Array], seen: int) -> dict[str, Array]:
    """Tokens [length] after `seen` others, as the inputs that the graph has."""
    import numpy as np

    row = tokens[None].astype(np.int64)
    every: dict[str, Array] = {
        "input_ids": row,
        "attention_mask": np.ones((1, seen + len(tokens)), np.int64),
        "position_ids": np.arange(seen, seen + len(tokens))[None],
        "token_type_ids": np.zeros_like(row),
        **past,
    }
    known = {i.name for i in session.get_inputs()}
    return {name: value for name, value in every.items() if name in known}


def empty_past(session: Any, folder: Path) -> dict[str, Array]:
    """Keys and values [1, heads, 0, width] of a text that is yet to begin; none of an encoder."""
    import numpy as np

    return {
        i.name: np.zeros(_empty(i.shape, folder), np.float16 if "16" in i.type else np.float32)
        for i in session.get_inputs()
        if PAST.fullmatch(i.name)
    }


def config_of(folder: Path) -> Mapping[str, Any]:
    """The model's part of genai_config.json, or else transformers' config."""
    for name, key in ((GENAI_CONFIG, "model"), ("config.json", "")):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_bytes())
            found: Mapping[str, Any] = content[key] if key else content
            return found
    raise FormatError(f"{folder}: has neither {GENAI_CONFIG} nor config.json. Keep them beside it.")


def _empty(shape: list[Any], folder: Path) -> tuple[int, int, int, int]:
    heads, width = shape[1], shape[3]
    if not isinstance(width, int):
        width = config_of(folder).get("decoder", {}).get("head_size")
    if not isinstance(heads, int) or not isinstance(width, int):
        raise FormatError(
            f"{folder}: its keys and values are {shape}, and no {GENAI_CONFIG} tells."
        )
    return 1, heads, 0, width
