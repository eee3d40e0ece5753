"""diffusers' pytorch_lora_weights.safetensors: PEFT's keys below the part of the pipeline.

Keys are part + module path + `.lora_A.weight`, `.lora_B.weight`, `.lora_B.bias`, `.lora_magnitude_vector`,
`.alpha`; the part is unet, transformer, text_encoder, ... PEFT's config stands as JSON in the file's metadata,
under lora_adapter_metadata, each field after its part and a dot; a model's own file (save_lora_adapter) has
neither part. Without it alpha is the `.alpha` tensor, or else the rank. Older spellings are in _diffusers_keys.py.

Written after diffusers' source (lora_base.py, state_dict_utils.py); diffusers itself has not been asked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _diffusers_keys, _diffusers_write, _one_file, _pair
from lorasurgery.dialects._peft_lora_config import check, site_config
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lora", "dora")

_BASE = "base_model_name_or_path"

Configs = Mapping[str, Mapping[str, Any]]


def detect(path: Path) -> bool:
    """One .safetensors file with diffusers' metadata, or keys that begin with a part of a pipeline."""
    file = _one_file.find(path, ".safetensors")
    if file is None:
        return False
    source = _one_file.opened(file, ".safetensors")
    alone = _diffusers_keys.METADATA in source.metadata
    keys = (_diffusers_keys.parse(name, alone=alone) for name in source)
    return any(key is not None and key.role in ("A", "B") for key in keys)


def read(path: Path) -> Adapter:
    """The adapter's sites; headers and alphas are read, factors when a site loads."""
    source = _one_file.opened(path, ".safetensors")
    configs = _diffusers_keys.configs(source)
    problems = [p for part in configs.values() for p in check(source.path, part)]
    sites, added = [], {}
    groups, strange = _sort(source, alone="" in configs)
    for (part, module), roles in groups.items():
        name = f"{part}.{module}" if part else module
        config = _config(source, name, roles, configs, (part, module))
        found = _one(source, name, roles, config)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        sites.append(found)
        if "bias" in roles:
            added[f"{name}.bias"] = (roles["bias"], config.scaling)
    return Adapter(
        path=path,
        dialect="diffusers",
        base=next(filter(None, (c.get(_BASE) for c in configs.values())), None),
        sites=tuple(sites),
        replaced={},
        added={n: replace(source.info(key), name=n) for n, (key, _) in added.items()},
        load=_one_file.nothing,
        load_added=lambda name: _scaled(source, *added[name]),
        settings={"parts": configs},
        problems=(*problems, *strange),
    )


def write(adapter: Adapter, folder: Path) -> None:
    """pytorch_lora_weights.safetensors. Raises FormatError for what these keys cannot say."""
    _diffusers_write.write(adapter, folder / "pytorch_lora_weights.safetensors", VARIANTS)


def _sort(
    source: Checkpoint, *, alone: bool
) -> tuple[dict[tuple[str, str], dict[str, str]], list[Problem]]:
    """(part, module) -> role -> key; and a problem for each key that is no such thing."""
    groups: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    problems = []
    for name in source:
        key = _diffusers_keys.parse(name, alone=alone)
        if key is None:
            info = source.info(name)
            problems.append(
                Problem(name, f"{name} {info.dtype} {list(info.shape)} is no factor that is known")
            )
            continue
        roles = groups[key.part, key.module]
        if key.role in roles:
            raise FormatError(
                f"{source.path}: {name} and {roles[key.role]} are both the {key.role} of "
                f"{key.module}. Restore the file."
            )
        roles[key.role] = name
    return groups, problems


def _config(
    source: Checkpoint,
    name: str,
    roles: Mapping[str, str],
    configs: Configs,
    where: tuple[str, str],
) -> AdapterConfig:
    """Of the metadata, or else of the file's alpha and A's rank."""
    part, module = where
    variant = "dora" if "m" in roles else "lora"
    if part in configs:
        if "alpha" in roles:
            raise FormatError(
                f"{source.path}: {roles['alpha']} is an alpha beside {_diffusers_keys.METADATA}, which has "
                "one too, and diffusers refuses both. Take one of them away."
            )
        return replace(site_config(configs[part], module), variant=variant)
    rank = source.info(roles["A"]).shape[0] if "A" in roles else 1
    if "alpha" not in roles:
        return AdapterConfig(variant, rank, float(rank))
    info = source.info(roles["alpha"])
    if info.numel != 1:
        raise FormatError(f"{source.path}: {name}: {info} is no number. Restore the file.")
    return AdapterConfig(variant, rank, float(source.read(info.name).reshape(-1)[0]))


def _one(
    source: Checkpoint, name: str, roles: Mapping[str, str], config: AdapterConfig
) -> Site | Problem:
    factors = {role: key for role, key in roles.items() if role in ("A", "B", "m")}
    if not factors:
        some = next(iter(roles.values()))
        return Problem(some, f"{some} stands alone: {name} has no factors")
    return _pair.site(source, name, factors, config, by_row=True)


def _scaled(source: Checkpoint, key: str, scaling: float) -> Array:
    import numpy as np

    return source.read(key).astype(np.float32) * np.float32(scaling)
