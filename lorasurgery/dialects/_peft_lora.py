"""LoRA and DoRA as PEFT stores them.

Keys are base_model.model. + module path + .lora_A.weight [r, in], .lora_B.weight [out, r], .lora_B.bias [out],
.lora_embedding_A [r, tokens], .lora_embedding_B [dim, r]; DoRA adds .lora_magnitude_vector [out], once
with .weight. Whole tensors stand under their own names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_lora_config, _peft_lora_write
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lora", "dora", "pissa", "olora")

_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<depth>(?:\.base_layer)*)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])"
    r"(?:\.default)?(?:\.(?P<kind>weight|bias))?"
)
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(?:\.default)?(?:\.weight)?")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
# the untouched base beside a saved module, which bias="all" sweeps up
_ORIGINAL = ".original_module."
# PEFT saves these by itself when they were resized or adapted
_EMBEDDINGS = re.compile(r"(.*\.)?(embed_tokens|lm_head)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class _Group:
    """The keys of one wrapped parameter: {'A': key, 'B': key, 'bias': key, 'm': key}."""

    module: str
    depth: int  # wrappers that lie around this one, when several parameters of a module are adapted
    embedding: bool


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """The adapter's sites and whole tensors; headers alone, factors are read when a site loads."""
    problems = _peft_lora_config.check(path / "adapter_config.json", config)
    groups, whole = _sort(source)
    if config.get("use_dora"):
        whole = _take_magnitudes(groups, whole)
    sites, added = [], {}
    for group, keys in groups.items():
        found = _site(source, config, group, keys)
        if isinstance(found, Problem):
            problems.append(found)
            continue
        sites.append(found)
        if "bias" in keys:
            name = f"{group.module}.bias"
            added[name] = (keys["bias"], found.config.scaling)
    replaced, strangers = wholes_of(source, config, whole, "LoRA")
    problems += strangers
    return Adapter(
        path=path,
        dialect="peft",
        base=config.get("base_model_name_or_path"),
        sites=tuple(sites),
        replaced={n: replace(source.info(key), name=n) for n, key in replaced.items()},
        added={n: replace(source.info(key), name=n) for n, (key, _) in added.items()},
        load=lambda name: source.read(replaced[name]),
        load_added=lambda name: _scaled(source, *added[name]),
        settings=config,
        problems=tuple(problems),
    )


def write(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors into an empty directory."""
    _peft_lora_write.write(adapter, folder)


def _sort(source: Checkpoint) -> tuple[dict[_Group, dict[str, str]], list[str]]:
    """Keys of factors by the parameter they adapt, and the keys of all other tensors."""
    groups: dict[_Group, dict[str, str]] = defaultdict(dict)
    whole = []
    for key in source:
        match = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            whole.append(key)
            continue
        depth = match["depth"].count("base_layer")
        module = _WRAPPED.sub("", match["module"])
        group = _Group(module, depth, bool(match["embedding"]))
        role = "bias" if match["kind"] == "bias" else match["letter"]
        groups[group][role] = key
    return groups, whole


def _take_magnitudes(groups: dict[_Group, dict[str, str]], keys: list[str]) -> list[str]:
    """Put DoRA's magnitudes to the factors of their modules; what is left of the keys."""
    owners, left = {group.module: group for group in groups if not group.depth}, []
    for key in keys:
        match = _MAGNITUDE.fullmatch(key.removeprefix(_PREFIX))
        if match and match["module"] in owners:
            groups[owners[match["module"]]]["m"] = key
        else:
            left.append(key)
    return left


def _site(
    source: Checkpoint, config: Mapping[str, Any], group: _Group, keys: Mapping[str, str]
) -> Site | Problem:
    """One adapted parameter, or why it is none."""
    some = next(iter(keys.values()))
    if not {"A", "B"} <= keys.keys():
        missing = "A" if "A" not in keys else "B"
        return Problem(some, f"{some} stands alone: lora_{missing} of {group.module} is missing")
    if config.get("use_dora") and "m" not in keys:
        return Problem(some, f"{group.module}: use_dora is true, but its magnitudes are missing")
    parameters = _peft_lora_config.parameters_of(config, group.module)
    parameter, stacked = "weight", False
    if group.depth < len(parameters):
        parameter, stacked = parameters[len(parameters) - 1 - group.depth], True
    elif group.depth or not _peft_lora_config.targeted(config, group.module):
        return Problem(
            some,
            f"{some}: the config's target_modules {_brief(config.get('target_modules'))} do not name "
            f"{group.module}",
        )
    name = f"{group.module}.{parameter}" if stacked else group.module
    site_config = _peft_lora_config.site_config(config, name)
    a, b = (source.info(keys[letter]) for letter in "AB")
    experts = _experts(a, b, site_config, stacked=stacked)
    if experts is None:
        return Problem(
            some,
            f"{group.module}: A {list(a.shape)} and B {list(b.shape)} are no factors of rank "
            f"{site_config.rank}, which the config gives this module",
        )
    layout = "experts" if experts > 1 else "parameter" if stacked else "linear"
    layout = "embedding" if group.embedding else layout
    if group.embedding and site_config.variant in _peft_lora_config.STARTS:
        site_config = replace(site_config, variant="lora")  # embeddings start at zero all the same
    read = _reader(source, keys, layout, experts)
    shapes = _turned_shapes(a, b, layout, experts)
    if "m" in keys:
        shapes["m"] = (1, b.shape[0]) if layout == "embedding" else (b.shape[0], 1)
        m = source.info(keys["m"])
        if m.numel != b.shape[0]:
            return Problem(
                m.name, f"{group.module}: {m.numel} magnitudes, but B is {list(b.shape)}"
            )
    infos = {letter: TensorInfo(keys[letter], "F32", shape) for letter, shape in shapes.items()}
    turned = bool(config.get("fan_in_fan_out"))
    kernel = a.shape[2:]
    return Site(group.module, parameter, layout, site_config, infos, read, kernel, turned)


def _experts(a: TensorInfo, b: TensorInfo, config: AdapterConfig, *, stacked: bool) -> int | None:
    """How many experts' factors are stacked in A and B, or None if they do not fit together."""
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        return None
    if any(size != 1 for size in b.shape[2:]) or a.shape[0] % config.rank:
        return None
    experts = a.shape[0] // config.rank
    return experts if experts == 1 or stacked else None


def _turned_shapes(
    a: TensorInfo, b: TensorInfo, layout: str, experts: int
) -> dict[str, tuple[int, ...]]:
    rank, in_, out = a.shape[0] // experts, a.numel // a.shape[0], b.shape[0]
    if layout == "embedding":
        return {"A": (rank, out), "B": (in_, rank)}
    if layout == "experts":
        return {"A": (experts, rank, in_), "B": (experts, out, rank)}
    return {"A": (rank, in_), "B": (out, rank)}


def _reader(
    source: Checkpoint, keys: Mapping[str, str], layout: str, experts: int
) -> Callable[[], dict[str, Array]]:
    """What loads the factors as float32, on W's side."""

    def load() -> dict[str, Array]:
        import numpy as np

        a, b = (source.read(keys[letter]).astype(np.float32) for letter in "AB")
        a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
        if layout == "embedding":  # the delta of [tokens, dim] is (B A)ᵀ
            a, b = b.T, a.T
        elif layout == "experts":  # in A the expert varies slowest, in B fastest
            a = a.reshape(experts, -1, a.shape[1])
            b = b.reshape(b.shape[0], -1, experts).transpose(2, 0, 1)
        factors = {"A": np.ascontiguousarray(a), "B": np.ascontiguousarray(b)}
        if "m" in keys:  # of an embedding [tokens, dim] each column is normed
            m = source.read(keys["m"]).astype(np.float32)
            factors["m"] = m.reshape((1, -1) if layout == "embedding" else (-1, 1))
        return factors

    return load


def _scaled(source: Checkpoint, key: str, scaling: float) -> Array:
    import numpy as np

    return source.read(key).astype(np.float32) * np.float32(scaling)


def wholes_of(
    source: Checkpoint, config: Mapping[str, Any], keys: Iterable[str], kind: str
) -> tuple[dict[str, str], list[Problem]]:
    """Keys that are no factors: the base's name -> the key that replaces it; and what has no place."""
    replaced, strangers = {}, []
    for key in keys:
        name = _WRAPPED.sub("", key.removeprefix(_PREFIX))
        if _ORIGINAL in key and key.replace(_ORIGINAL, ".") in source:
            continue
        if _expected(config, name):
            replaced[name] = key
        else:
            strangers.append(Problem(key, f"{key} {_facts(source, key)} is no part of a {kind}"))
    return replaced, strangers


def _expected(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT writes this whole tensor for such a config."""
    if name.endswith(".bias") and config.get("bias", "none") != "none":
        return True
    return _peft_lora_config.kept_whole(config, name) or bool(_EMBEDDINGS.fullmatch(name))


def _facts(source: Checkpoint, key: str) -> str:
    info = source.info(key)
    return f"{info.dtype} {list(info.shape)}"


def _brief(targets: Any) -> str:
    text = repr(targets)
    return text if len(text) <= 120 else f"{text[:117]}..."
