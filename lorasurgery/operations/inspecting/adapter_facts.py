"""What an adapter says of itself: variant, ranks, alphas, targets, base; from names and headers.

FORMATS.md's suffixes: PEFT, kohya and LyCORIS, diffusers, GGUF. Nothing here is needed to apply
an adapter: dialects read them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from lorasurgery.checkpoint import Checkpoint
from lorasurgery.operations.inspecting.source import Source

# suffix -> the variant that has it, and the axis along which its size is the rank
_FACTORS: dict[str, tuple[str, int | None]] = {
    ".lora_A.weight": ("lora", 0), ".lora_B.weight": ("lora", None),
    ".lora_A": ("lora", 0), ".lora_B": ("lora", None),
    ".lora_A.default.weight": ("lora", 0), ".lora_B.default.weight": ("lora", None),
    ".lora_embedding_A": ("lora", 0), ".lora_embedding_B": ("lora", None),
    ".lora_down.weight": ("lora", 0), ".lora_up.weight": ("lora", None),
    ".lora.down.weight": ("lora", 0), ".lora.up.weight": ("lora", None),
    ".lora_a": ("lora", 0), ".lora_b": ("lora", None),
    ".lora_E": ("adalora", None),
    ".lora_magnitude_vector": ("dora", None), ".lora_magnitude_vector.weight": ("dora", None),
    ".dora_scale": ("dora", None),
    ".vera_lambda_d": ("vera", 0), ".vera_lambda_b": ("vera", None),
    ".hada_w1_b": ("loha", 0), ".hada_w1_a": ("loha", None), ".hada_w2_a": ("loha", None),
    ".hada_w2_b": ("loha", None),
    ".lokr_w1": ("lokr", None), ".lokr_w2": ("lokr", None), ".lokr_w1_a": ("lokr", None),
    ".lokr_w1_b": ("lokr", 0), ".lokr_w2_a": ("lokr", None), ".lokr_w2_b": ("lokr", 0),
    ".oft_R.weight": ("oft", None), ".oft_blocks": ("oft", None), ".oft_diag": ("oft", None),
    ".ia3_l": ("ia3", None),
}  # fmt: skip
# the more special variant has all of the plainer one's factors and one more
_SPECIAL = ("adalora", "dora")
_SUFFIXES = sorted(_FACTORS, key=len, reverse=True)
_DIFFUSERS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")


def adapter_facts(source: Source) -> dict[str, Any] | None:
    """None for what is no adapter."""
    config = source.documents.get("adapter_config.json", {})
    sites = _sites(source.stored)
    if not config and not sites:
        return None
    layout = _layout(source, config)
    modules = sorted({module for module, _ in sites})
    facts = {
        "layout": layout,
        "variant": _variant(config, [suffix for _, suffix in sites]),
        "rank_stabilized": bool(config.get("use_rslora")),
        "ranks": _ranks(source.stored, sites, config),
        "alphas": _alphas(source, config),
        "modules": len(modules),
        "targets": _targets(modules, layout),
        "modules_to_save": config.get("modules_to_save") or [],
        "base": _base(source.stored.metadata, config),
    }
    return facts | ({"config": dict(config)} if config else {})


def _sites(stored: Checkpoint) -> list[tuple[str, str]]:
    """(module path, suffix) of each tensor that is a factor."""
    pairs = ((name, next((s for s in _SUFFIXES if name.endswith(s)), None)) for name in stored)
    return [(name.removesuffix(suffix), suffix) for name, suffix in pairs if suffix]


def _layout(source: Source, config: Mapping[str, Any]) -> str:
    names = list(source.stored)
    if source.format == "gguf":
        return "gguf"
    if config or any(name.startswith("base_model.model.") for name in names):
        return "peft"
    if any(name.startswith("lora_") or name.endswith(".alpha") for name in names):
        return "kohya"
    return "diffusers" if any(name.startswith(_DIFFUSERS) for name in names) else "unknown"


def _variant(config: Mapping[str, Any], suffixes: list[str]) -> str:
    kinds = {_FACTORS[suffix][0] for suffix in suffixes}
    declared = str(config.get("peft_type", "")).lower()
    if declared and declared != "lora":
        return declared
    return next((k for k in (*_SPECIAL, *sorted(kinds)) if k in kinds), declared or "unknown")


def _ranks(
    stored: Checkpoint, sites: list[tuple[str, str]], config: Mapping[str, Any]
) -> dict[int, int]:
    """Rank -> number of factors of that rank, as the tensors are, smallest first."""
    # A of fused experts is [experts * r, in]: there the config alone knows r
    fused = {str(p).split(".")[-2] for p in config.get("target_parameters") or () if "." in str(p)}
    counts: Counter[int] = Counter()
    for module, suffix in sites:
        axis = _FACTORS[suffix][1]
        shape = stored.info(module + suffix).shape
        if axis is None or len(shape) <= axis:
            continue
        last = module.removesuffix(".base_layer").rpartition(".")[2]
        counts[int(config["r"]) if last in fused and "r" in config else shape[axis]] += 1
    return dict(sorted(counts.items()))


def _alphas(source: Source, config: Mapping[str, Any]) -> list[float]:
    """Every alpha that the file or the config names; none where the trainer wrote none."""
    stored = source.stored
    values = [config.get("lora_alpha"), config.get("alpha")]
    values += (config.get("alpha_pattern") or {}).values()
    values += [float(stored.read(n)) for n in stored if n.endswith(".alpha")]
    values += _diffusers_alphas(stored.metadata)
    if source.format == "gguf":
        from lorasurgery.formats.gguf import File

        assert isinstance(stored, File)
        values.append(stored.values.get("adapter.lora.alpha"))
    return sorted({float(v) for v in values if isinstance(v, (int, float))})


def _diffusers_alphas(metadata: Mapping[str, str]) -> list[object]:
    try:
        facts = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return []
    return (
        [v for k, v in facts.items() if k.endswith("lora_alpha")] if isinstance(facts, dict) else []
    )


def _targets(modules: list[str], layout: str) -> list[str]:
    """The last part of the adapted modules' paths."""
    if layout == "kohya":  # lora_unet_down_blocks_0_attentions_1_proj_in
        return sorted({re.split(r"_\d+_", module.partition(".")[0])[-1] for module in modules})
    paths = [m.removesuffix(".base_layer").removesuffix(".weight") for m in modules]
    return sorted({path.rpartition(".")[2] for path in paths})


def _base(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str | None:
    names = (
        config.get("base_model_name_or_path"),
        metadata.get("ss_sd_model_name"),
        metadata.get("general.base_model.0.name"),
    )
    return next((str(name) for name in names if name), None)
