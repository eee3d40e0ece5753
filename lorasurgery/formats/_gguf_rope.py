"""Rotary embeddings of a GGUF header <-> transformers' config: rope_theta, rope_scaling.

llama.cpp stores Llama 3.1's rescaling as a tensor of divisors, rope_freqs [head_dim / 2]; its rule
(Llama 3.1's reference code) is recognised by computing that tensor again.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lorasurgery.errors import FormatError
from lorasurgery.formats._gguf_write import Value

if TYPE_CHECKING:
    from lorasurgery.formats.gguf import File

# the constants that all models of the rule were trained with
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def parameters(file: File) -> tuple[dict[str, Any], list[str]]:
    """Config entries, and a line for each part of the header that they do not express."""
    prefix = f"{file.architecture}.rope"
    theta = file.values.get(f"{prefix}.freq_base")
    theta = theta if isinstance(theta, float) and theta > 0 else 10000.0
    config: dict[str, Any] = {"rope_theta": theta}
    scaling: dict[str, Any] | None = None
    if "rope_freqs.weight" in file.computed:
        scaling = _llama3(_floats(file, "rope_freqs.weight"), theta)
    elif "rope_factors_long.weight" in file.computed:
        scaling = {
            "rope_type": "longrope",
            "long_factor": _floats(file, "rope_factors_long.weight"),
            "short_factor": _floats(file, "rope_factors_short.weight"),
        }
        original = file.values.get(f"{prefix}.scaling.original_context_length")
        config |= {"original_max_position_embeddings": original} if original else {}
    elif file.values.get(f"{prefix}.scaling.type") in ("linear", "yarn"):
        scaling = _simple(file, prefix)
    if scaling is not None:
        config["rope_scaling"] = scaling
    elif file.computed or file.values.get(f"{prefix}.scaling.type", "none") != "none":
        return config, [
            f"{file.path}: the rope scaling of the header is not expressed in config.json; long "
            "contexts may differ. Set rope_scaling by hand."
        ]
    return config, []


def _simple(file: File, prefix: str) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": file.values[f"{prefix}.scaling.type"],
        "factor": file.values.get(f"{prefix}.scaling.factor", 1.0),
    }
    original = file.values.get(f"{prefix}.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    return scaling


def _floats(file: File, name: str) -> list[float]:
    tensor = file.computed.get(name)
    if tensor is None or tensor.kind != "F32":
        return []
    return list(struct.unpack(f"<{tensor.nbytes // 4}f", file.raw(tensor)))


class _Rule(NamedTuple):
    factor: float
    low: float
    high: float
    original: float


def _llama3(divisors: list[float], theta: float) -> dict[str, Any] | None:
    """The rule's parameters if it gives these divisors, else None."""
    factor, n = max(divisors, default=0.0), len(divisors)
    rule = _Rule(factor, _LOW, _HIGH, _ORIGINAL)
    if factor <= 1 or any(
        not math.isclose(_divisor(theta ** (-i / n), rule), divisor, rel_tol=1e-4)
        for i, divisor in enumerate(divisors)
    ):
        return None
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": _LOW,
        "high_freq_factor": _HIGH, "original_max_position_embeddings": _ORIGINAL,
    }  # fmt: skip


def _divisor(frequency: float, rule: _Rule) -> float:
    """1 for short wavelengths, `factor` for long ones, smooth between them."""
    turns = rule.original * frequency / (2 * math.pi)  # in the original context
    if turns > rule.high:
        return 1.0
    if turns < rule.low:
        return rule.factor
    smooth = (turns - rule.low) / (rule.high - rule.low)
    return 1 / ((1 - smooth) / rule.factor + smooth)


def _scaling(config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """theta and scaling, as either generation of config.json says them."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = said.get("rope_theta") or config.get("rope_theta") or 10000.0
    return float(theta), dict(said)


def header(where: str, config: Mapping[str, Any]) -> dict[str, Value]:
    """The keys behind ARCHITECTURE. that say it. Raises FormatError for a scaling that none says."""
    theta, said = _scaling(config)
    kind = said.get("rope_type") or said.get("type") or "default"
    found: dict[str, Value] = {"rope.freq_base": theta}
    if kind in ("default", "llama3"):
        return found
    known = {"rope_theta", "rope_type", "type", "factor", "original_max_position_embeddings"}
    more = sorted(key for key, value in said.items() if key not in known and value is not None)
    if kind not in ("linear", "yarn") or more:
        what = f"{kind!r} with {', '.join(more)}" if more else repr(kind)
        raise FormatError(
            f"{where}: rope scaling {what} has no place in a GGUF of this architecture. Export --to onnx."
        )
    found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(said.get("factor") or 1.0)}
    original = said.get("original_max_position_embeddings") or (
        config.get("max_position_embeddings") if kind == "yarn" else None
    )
    return found | ({"rope.scaling.original_context_length": int(original)} if original else {})


def divisors(config: Mapping[str, Any], head_dim: int) -> list[float]:
    """rope_freqs [head_dim / 2] of Llama 3.1's rule; empty for others."""
    theta, said = _scaling(config)
    if (said.get("rope_type") or said.get("type")) != "llama3":
        return []
    rule = _Rule(
        float(said["factor"]),
        float(said["low_freq_factor"]),
        float(said["high_freq_factor"]),
        float(said["original_max_position_embeddings"]),
    )
    half = head_dim // 2
    return [_divisor(theta ** (-i / half), rule) for i in range(half)]
