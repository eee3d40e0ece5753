"""PEFT's types whose formulas are PEFT's alone: one form for all, merged by its own layers.

Listed are those that change weights and nothing else, each held against merge_and_unload in tests/oracles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_lora_config
from lorasurgery.dialects._peft_lora import _ORIGINAL, _WRAPPED, _expected, _facts
from lorasurgery.dialects._peft_lora_write import PREFIX, Stored, save, wholes
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("peft_bridge",)

# what each type keeps once for all modules, by the ends of its keys
TYPES: Mapping[str, tuple[str, ...]] = {
    "BOFT": (), "HRA": (), "FOURIERFT": (), "MISS": (), "SHIRA": (), "HIRA": (), "C3A": (),
    "DELORA": (), "GRALORA": (), "WAVEFT": (), "PSOFT": (), "PEANUT": (), "OSF": (), "DEFT": (), "VBLORA": ("vblora_vector_bank",),
}  # fmt: skip


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks. Raises UsageError where peft is not installed."""
    kind = str(config["peft_type"]).upper()
    known = fields(plugins.load("adapters", "peft_bridge").config_class(kind))
    spoken = form.Kind(kind, {}, frozenset(f.name for f in known))
    problems = form.check(path / "adapter_config.json", config, spoken)
    groups: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    shared, replaced = {}, {}
    for key in source:
        name, info = _WRAPPED.sub("", key.removeprefix(PREFIX)), source.info(key)
        module = _module(config, name)
        if _ORIGINAL in key and key.replace(_ORIGINAL, ".") in source:
            continue
        if module and ".base_layer." not in key:
            groups[module][name.removeprefix(f"{module}.")] = info
        elif key.rpartition(".")[2] in TYPES[kind]:
            shared[f"/{key}"] = info
        elif _expected(config, name):
            replaced[name] = key
        else:
            problems.append(Problem(key, f"{key} {_facts(source, key)} is no part of a {kind}"))
    return Adapter(
        path=path,
        dialect="peft",
        base=config.get("base_model_name_or_path"),
        sites=tuple(
            _site(source, config, module, {**keys, **shared}) for module, keys in groups.items()
        ),
        replaced={n: replace(source.info(key), name=n) for n, key in replaced.items()},
        added={},
        load=lambda name: source.read(replaced[name]),
        load_added=source.read,
        settings=config,
        problems=tuple(problems),
    )


def write(adapter: Adapter, folder: Path) -> None:
    """The keys and the config that were read; nothing else makes such an adapter."""
    if str(adapter.settings.get("peft_type")) not in TYPES:
        raise FormatError(
            f"{adapter.path}: its config says no type that PEFT's layers could be made of. Write it "
            "as it was read."
        )
    tensors: dict[str, Stored] = {}
    for site in adapter.sites:
        for name, info in site.factors.items():
            tensors[info.name] = (info, _one(site, name, info))
    save(folder, adapter.settings, {**tensors, **dict(wholes(adapter))})


def _one(site: Site, name: str, info: TensorInfo) -> Callable[[], Array]:
    from lorasurgery.arrays import NUMPY

    return lambda: site.load()[name].astype(NUMPY[info.dtype])


def _module(config: Mapping[str, Any], name: str) -> str | None:
    """The adapted module that a key lies below."""
    parts = name.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if _peft_lora_config.targeted(config, path)), None)


def _site(
    source: Checkpoint, config: Mapping[str, Any], module: str, keys: Mapping[str, TensorInfo]
) -> Site:
    def load() -> dict[str, Array]:
        import numpy as np

        read = {name: np.array(source.read(info.name)) for name, info in keys.items()}
        # indices stay what they are
        return {n: f if f.dtype.kind in "iu" else f.astype(np.float32) for n, f in read.items()}

    said = AdapterConfig("peft_bridge", 1, 1.0, extra={"settings": config, "module": module})
    turned = bool(config.get("fan_in_fan_out"))
    return Site(module, "weight", "linear", said, keys, load, fan_in_fan_out=turned)
