"""A decoder of transformers as an ONNX graph, by onnxruntime-genai's model builder (extra `genai`).

The builder runs in a process of its own, whose memory is gone when the graph is written. It wants a plain
directory with a tokenizer, and writes model.onnx, genai_config.json and the tokenizer as its runtime reads it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lorasurgery.errors import FormatError, UsageError
from lorasurgery.model import Model

GENAI_CONFIG = "genai_config.json"
_BUILDER = "onnxruntime_genai.models.builder"
# an architecture is an `if` of the builder's, and nothing lists them
_ARCHITECTURE = re.compile(r'architectures\[0\] == "(\w+)"')


@dataclass(frozen=True, slots=True)
class Build:
    """How the graph is made: its float type, the provider it is for, and whether q, k and v are one product."""

    dtype: str = "fp32"
    provider: str = "cpu"
    fused: bool = True


def check_decoder(model: Model, others: str) -> None:
    """Raise UsageError where the builder is missing, FormatError for what it does not build.

    `others` says what else is exported.
    """
    if (source := _source()) is None:
        raise UsageError(
            "export: a decoder needs onnxruntime-genai. Run `pip install 'lorasurgery[genai]'`."
        )
    known = set(_ARCHITECTURE.findall(source.read_text(encoding="utf-8")))
    named = (model.config.get("architectures") or [None])[0]
    if named not in known:
        what = named or model.config.get("model_type") or "a model without config.json"
        raise FormatError(
            f"{model.path}: {what} is none of the architectures that are exported: {others}, and what "
            f"onnxruntime-genai builds ({', '.join(sorted(known))}). Export it with its own tools, and "
            "quantize or merge the ONNX file."
        )
    if not any((model.path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FormatError(
            f"{model.path}: has no tokenizer, which onnxruntime-genai carries along. Put tokenizer.json "
            "beside the weights."
        )


def build_decoder(folder: Path, target: Path, build: Build) -> None:
    """Write the graph of a plain model directory into `target`. Raises FormatError where the builder fails."""
    command = [
        sys.executable, "-m", _BUILDER, "-i", str(folder), "-o", str(target), "-p", build.dtype,
        "-e", build.provider, "-c", str(target.with_name("cache")), "--extra_options", "hf_token=false",
        f"fuse_qkv={str(build.fused).lower()}",
    ]  # fmt: skip
    # what it needs lies in the directory
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise FormatError(
            f"{folder}: onnxruntime-genai does not build it ({said[-1] if said else done.returncode})."
        )


def fuses(config: Mapping[str, object], block: int) -> bool:
    """Whether q, k and v in one matrix have the blocks that they have alone: no block crosses a row."""
    width = config.get("hidden_size")
    return isinstance(width, int) and width % block == 0


def _source() -> Path | None:
    """The builder's source. Finding it imports neither it nor torch."""
    found = importlib.util.find_spec("onnxruntime_genai")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / "models" / "builder.py"
    return file if file.is_file() else None
