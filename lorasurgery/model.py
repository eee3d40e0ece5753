"""A model directory: its weights, its config.json, and the files that travel along."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasurgery.checkpoint import (
    JOURNAL,
    MANIFEST,
    Checkpoint,
    check_inside,
    open_checkpoint,
    read_json,
)
from lorasurgery.device import HOST, Device
from lorasurgery.errors import FormatError
from lorasurgery.layouts import is_conv1d
from lorasurgery.tensors import DTYPE_NAMES, TensorInfo
from lorasurgery.weights import Weights

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data",
    ".index.json", ".partial",
)  # fmt: skip
_OURS = (MANIFEST, JOURNAL)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")

# nn.Embedding tables, output heads and what is no matrix product, by the names that models give them
_NOT_LINEAR = (
    "*embed*", "*wte*", "*wpe*", "*lm_head*", "*output_projection*", "shared.weight", "score.weight", "*norm*",
    "*ln_*", "*relative_attention_bias*", "*position*", "*cls.predictions*",
)  # fmt: skip
# transformers holds these as fused parameters, which bitsandbytes leaves alone
_EXPERTS = ("*experts*", "*.gate.weight", "*.router.*")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Model:
    """An opened model: `stored` is what the files hold, `weights` the logical view of it."""

    path: Path
    stored: Checkpoint
    weights: Weights
    config: Mapping[str, Any]

    @property
    def files(self) -> dict[str, Path]:
        """The side files (tokenizer, generation config, chat template, code), by relative name.

        Raises FormatError for one that is a link out of the directory: what it leads to would be
        published with the output.
        """
        if not self.path.is_dir():
            return {}
        found = {}
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path)
            if file.is_file() and _travels(name):
                check_inside(self.path, file)
                found[str(name)] = file
        return found

    def with_config(self, config: Mapping[str, Any]) -> dict[str, bytes | Path]:
        """The side files with another config.json."""
        files: dict[str, bytes | Path] = dict(self.files)
        if config:
            files["config.json"] = json.dumps(config, indent=2).encode() + b"\n"
        return files


def _travels(name: Path) -> bool:
    """Whether a file of a model directory belongs beside weights that are made from its own."""
    hidden = any(part.startswith(".") for part in name.parts)
    weights = name.name.endswith(_WEIGHTS) or "residual_adapter" in name.parts
    return not hidden and not weights and name.name not in _OURS


def with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config.json, and the configs of parts in it, saying another dtype of the weights."""
    names = {code: name for name, code in DTYPE_NAMES.items()}
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and dtype:
            changed[key] = names[dtype]
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed[key] = with_dtype(value, dtype)
    return changed


def open_model(path: Path, dtype: str | None = None, device: Device = HOST) -> Model:
    """Open a directory or one weight file; headers alone are read.

    Packed weights are decoded to `dtype`, on `device`.
    """
    stored = open_checkpoint(path)
    home = path if path.is_dir() else path.parent
    has_config = path.is_dir() and (home / "config.json").exists()
    config = read_json(home / "config.json") if has_config else {}
    weights = Weights(stored, dtype, lambda name: is_conv1d(config, name), device)
    return Model(path, stored, weights, config)


def resolve(text: str) -> Path:
    """A path as it is; `org/name[@revision]` downloaded into the hub's cache."""
    if Path(text).exists() or not HUB_ID.fullmatch(text):
        return Path(text)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = text.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FormatError(
            f"{text}: no such path, and the hub does not give it ({reason}). Check the name."
        ) from None


def linear_weights(model: Model, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The matrices that a forward multiplies by, as bitsandbytes would choose; globs may correct it."""
    experts = any(model.config.get(key) for key in _EXPERT_KEYS)
    left_out = [*_NOT_LINEAR, *(_EXPERTS if experts else ())]
    names = []
    for name in model.weights:
        info = model.weights.info(name)
        if name in model.weights.packed or not _is_matrix(info):
            continue
        wanted = matches(name, include) if include else not matches(name, left_out)
        if wanted and not matches(name, exclude):
            names.append(name)
    return names


def _is_matrix(info: TensorInfo) -> bool:
    return info.name.endswith(".weight") and len(info.shape) == 2 and info.dtype in (
        "F32", "BF16", "F16",
    )  # fmt: skip


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a glob fits the tensor's name, or its module's."""
    module = name.removesuffix(".weight")
    return any(fnmatch.fnmatchcase(n, p) for p in patterns for n in (name, module))
