"""The fields of PEFT's adapter_config.json: which are read, which say nothing of weights, which refuse.

Checked against LoraConfig of peft 0.21; older versions wrote subsets of these fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasurgery.adapter import AdapterConfig
from lorasurgery.dialects._peft_lora_patterns import fitting, listed, match
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.layouts import EXPERTS
from lorasurgery.plugins import suggestion
from lorasurgery.problems import Problem

# fields that say how weights are to be merged
READ = {
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "target_parameters", "modules_to_save", "bias", "fan_in_fan_out", "init_lora_weights",
    "use_dora",
}  # fmt: skip
# fields of training and bookkeeping: whatever they hold, the merged weights are the same
SILENT = {
    "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "velora_config", "enable_lora", "merge_weights",
}  # fmt: skip
# fields that change what the factors mean; only a neutral value is understood
REFUSED = {
    "use_qalora": "its A works on pooled inputs",
    "alora_invocation_tokens": "it acts on some tokens alone, so no merged weight does the same",
    "arrow_config": "a router chooses among adapters for each token",
    "kasa_config": "its factors belong to a base that was truncated by SVD",
    "megatron_config": "its layers are split over devices",
    "monteclora_config": "its factors are drawn from a distribution",
    "use_bdlora": "its factors are block-diagonal",
    "layer_replication": "its layers are copies that the base does not have",
    "trainable_token_indices": "it replaces single rows of an embedding",
}
# one of them adapted, PEFT adapts the other to match
_TIED = ("embed_tokens", "lm_head", "wte")
# starts that take something out of the base, which the saved factors rely on
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# those of them that the base alone gives again
STARTS = ("pissa", "olora")


def start_of(config: Mapping[str, Any]) -> str | None:
    """The start that took something out of the base, if there was one."""
    start = config.get("init_lora_weights")
    mutating = isinstance(start, str) and start.lower().startswith(_MUTATING)
    return start.lower() if isinstance(start, str) and mutating else None


def check(path: Path, config: Mapping[str, Any]) -> list[Problem]:
    """The fields that nobody knows. Raises what no flag allows: a changed meaning."""
    for field, reason in REFUSED.items():
        if config.get(field):
            raise MatchError(
                f"{path}: {field} is {config[field]!r}: {reason}. Merge it with PEFT itself."
            )
    if config.get("use_dora") and config.get("lora_bias"):
        raise MatchError(
            f"{path}: use_dora and lora_bias are both true: PEFT has no such layer, so that nobody "
            "knows what its bias is scaled by. Set one to false."
        )
    start = config.get("init_lora_weights")
    again = start in STARTS and not config.get("use_dora")
    if start == "olora" and config.get("fan_in_fan_out"):
        again = (
            False  # PEFT takes it out of W as it is stored, [in, out], and adds B A the other way
        )
    if start_of(config) and not again:
        base = f"what was left of {config.get('base_model_name_or_path')} at the start of training"
        how = "" if start == "loftq" else "--init START, or "
        raise MatchError(
            f"{path}: init_lora_weights is {start!r}: its factors belong to {base}. Convert it with "
            f"{how}--residual MODEL first."
        )
    known = {*READ, *SILENT, *REFUSED}
    return [
        Problem(
            field,
            f"config field {field!r} is unknown. {suggestion(field, sorted(known))[:-1]}",
        )
        for field, value in config.items()
        if field not in known and value not in (None, False, [], {}, "")
    ]


def site_config(config: Mapping[str, Any], key: str) -> AdapterConfig:
    """Rank and alpha of one module path; the patterns are regexes, the first that fits wins."""
    rank = fitting(config.get("rank_pattern"), key, config.get("r", 8))
    alpha = fitting(config.get("alpha_pattern"), key, config.get("lora_alpha", 8))
    try:
        rank, alpha = int(rank), float(alpha)
    except (TypeError, ValueError):
        raise FormatError(
            f"{key}: rank {rank!r} and alpha {alpha!r} are not numbers. Mend adapter_config.json."
        ) from None
    if rank < 1:
        raise FormatError(f"{key}: rank {rank} is not positive. Mend adapter_config.json.")
    start = config.get("init_lora_weights")
    variant = "dora" if config.get("use_dora") else start if start in STARTS else "lora"
    return AdapterConfig(variant, rank, alpha, bool(config.get("use_rslora")))


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT, given this config, would put an adapter on this module."""
    if _excluded(config.get("exclude_modules"), module) or saved(config, module):
        return False
    if config.get("ensure_weight_tying") and module.endswith(_TIED):
        return True
    targets = config.get("target_modules")
    if targets is None:
        return not config.get("target_parameters")
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or bool(match(f"(?:{targets})$", module))
    return listed(targets, module) and _in_layers(config, module)


def saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether the module, or one that holds it, is kept whole by modules_to_save."""
    names = config.get("modules_to_save") or ()
    return any(match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


def kept_whole(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT saves this tensor for its module's sake: it matches ends of paths, dot or no dot."""
    owners = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    names = tuple(config.get("modules_to_save") or ())
    return bool(names) and (saved(config, name) or any(owner.endswith(names) for owner in owners))


def parameters_of(config: Mapping[str, Any], module: str) -> list[str]:
    """Which of a module's parameters target_parameters names, in the order of their registration."""
    found = []
    for target in config.get("target_parameters") or ():
        owner, _, parameter = target.rpartition(".")
        if not owner and parameter in EXPERTS:
            # a bare name is of whichever modules own such a parameter: the stacks of experts
            owner = module if module.endswith("experts") else parameter
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    # fused experts register what leads in before what leads out
    return sorted(set(found), key=lambda name: ("down" in name, name))


def _excluded(excluded: Any, module: str) -> bool:
    if isinstance(excluded, str):
        return bool(match(f"(?:{excluded})$", module))
    return bool(excluded) and listed(excluded, module)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # the first numbered part is the layer; a later one may be an expert
    forms = [rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\." for p in patterns] or [
        r".*?\.[^.]*\.(?P<idx>\d+)\."
    ]
    found = next((m for form in forms if (m := match(form, module))), None)
    return found is not None and int(found["idx"]) in (
        [layers] if isinstance(layers, int) else layers
    )
