"""Writing PEFT's layout: the keys and the config with which PEFT builds the same layers again."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorasurgery.adapter import Adapter, Site
from lorasurgery.dialects import _peft_lora_config as lora
from lorasurgery.errors import FormatError
from lorasurgery.formats import safetensors
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# what is known of a tensor, and what gives it as it is stored
Stored: TypeAlias = tuple[TensorInfo, Callable[[], "Array"]]

PREFIX = "base_model.model."
_EXPERT = re.compile(r"^.*\.experts\.\d+\.(\w+)$")
# fields that follow from the sites; the others are carried along from where the adapter came
_DERIVED = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "bias", "init_lora_weights", "ensure_weight_tying", "lora_bias", "use_dora",
)  # fmt: skip


def write(adapter: Adapter, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors into an empty directory, a tensor at a time."""
    save(folder, config_of(adapter), dict(_tensors(adapter)))


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The two files, whatever the type, a tensor at a time."""
    infos = [info for info, _ in tensors.values()]
    header = safetensors.header_of(infos, {"format": "pt", **(metadata or {})})
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for info, load in tensors.values():
            data = load()
            assert data.nbytes == info.nbytes, info
            file.write(data.tobytes())
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")


def config_of(adapter: Adapter) -> dict[str, Any]:
    """LoraConfig's fields: the most common rank and alpha, and patterns for the sites that differ."""
    names = {
        f"{s.module}.{s.parameter}" if _by_parameter(s) else s.module: s for s in adapter.sites
    }
    ranks = {name: site.config.rank for name, site in names.items()}
    alphas = {name: site.config.alpha for name, site in names.items()}
    rank, alpha = _usual(ranks.values(), 8), _usual(alphas.values(), 8.0)
    stabilized = {site.config.rank_stabilized for site in adapter.sites}
    if len(stabilized) > 1:
        raise FormatError(
            f"{adapter.path}: some sites are scaled by alpha / sqrt(r) and some by alpha / r, which "
            "PEFT has one flag for. Bake the scale in."
        )
    variants = {s.config.variant for s in adapter.sites if s.layout != "embedding"}
    variants = variants or {site.config.variant for site in adapter.sites}
    if len(variants) > 1:
        several = " and some ".join(sorted(variants))
        raise FormatError(
            f"{adapter.path}: some sites are {several}, which PEFT has one flag for. Convert them to one "
            "of them."
        )
    # of another layout's or another type's settings, what LoRA has too
    known = {*lora.READ, *lora.SILENT} - set(_DERIVED) if adapter.dialect == "peft" else set()
    kept = {k: v for k, v in adapter.settings.items() if k in known}
    return {
        "task_type": None,
        "lora_dropout": 0.0,
        "inference_mode": True,
        "revision": None,
        **kept,
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "use_rslora": stabilized == {True},
        "use_dora": any("m" in site.factors for site in adapter.sites),
        "rank_pattern": {f"^{n}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{n}": _plain(a) for n, a in alphas.items() if a != alpha},
        "target_modules": _targets([n for n, s in names.items() if not _by_parameter(s)]) or None,
        "target_parameters": [n for n, s in names.items() if _by_parameter(s)] or None,
        "modules_to_save": owners(adapter) or None,
        "bias": "all" if any(n.endswith(".bias") for n in adapter.replaced) else "none",
        "lora_bias": bool(adapter.added),
        "init_lora_weights": next(iter(variants & set(lora.STARTS)), True),
    }


def _targets(modules: Sequence[str]) -> list[str]:
    """Whole paths; of an expert's matrix the last name, which PEFT knows in models that stack them."""
    return list(dict.fromkeys(_EXPERT.sub(r"\1", module) for module in modules))


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Stored]]:
    """By key."""
    depths = _depths(adapter.sites)
    for site in adapter.sites:
        under = f"{PREFIX}{site.module}{'.base_layer' * depths[id(site)]}"
        for letter in "AB":
            embedding = site.layout == "embedding"
            key = f"{under}.lora_{'embedding_' if embedding else ''}{letter}"
            key += "" if embedding else ".weight"
            info = TensorInfo(key, site.factors[letter].dtype, _stored_shape(site, letter))
            yield key, (info, _stored(site, letter))
        if "m" in site.factors:
            key = f"{under}.lora_magnitude_vector"
            dtype = site.factors["m"].dtype
            yield key, (TensorInfo(key, dtype, _magnitudes(adapter, site)), _stored(site, "m"))
    yield from wholes(adapter)
    scalings = {f"{site.module}.bias": site.config.scaling for site in adapter.sites}
    for name, info in adapter.added.items():
        key = f"{PREFIX}{name.removesuffix('.bias')}.lora_B.bias"
        yield key, (TensorInfo(key, "F32", info.shape), _unscaled(adapter, name, scalings[name]))


def wholes(adapter: Adapter) -> Iterator[tuple[str, Stored]]:
    """The tensors that replace the base's, by key."""
    adapted = {site.module for site in adapter.sites}
    for name, info in adapter.replaced.items():
        owner, _, parameter = name.rpartition(".")
        # beside factors stands the base's own, of an embedding or a head
        key = f"{PREFIX}{owner}.base_layer.{parameter}" if owner in adapted else PREFIX + name
        yield key, (TensorInfo(key, info.dtype, info.shape), _whole(adapter, name))


def _stored_shape(site: Site, letter: str) -> tuple[int, ...]:
    shape = site.factors[letter].shape
    if site.layout == "embedding":  # A [r, tokens] and B [dim, r] are the turned factors, swapped
        return tuple(reversed(site.factors["B" if letter == "A" else "A"].shape))
    if site.layout != "experts":
        rank, in_ = site.factors["A"].shape[-2:]
        spread = (rank, in_ // math.prod(site.kernel), *site.kernel)
        return spread if letter == "A" else (*shape, *(1 for _ in site.kernel))
    if letter == "A":
        return (shape[0] * shape[1], shape[2])
    return (shape[1], shape[2] * shape[0])


def _magnitudes(adapter: Adapter, site: Site) -> tuple[int, ...]:
    """The shape that PEFT stores them in; raises FormatError for an axis that it does not norm."""
    shape, embedding = site.factors["m"].shape, site.layout == "embedding"
    size = shape[-1] if embedding else shape[-2]
    if shape != ((1, size) if embedding else (size, 1)):
        raise FormatError(
            f"{adapter.path}: {site.module} has magnitudes {list(shape)}: PEFT norms the other axis. "
            "Convert it to LoRA."
        )
    return (1, size, *(1 for _ in site.kernel)) if site.kernel else (size,)


def _stored(site: Site, letter: str) -> Callable[[], Array]:
    """The factor as PEFT stores it: in A the expert varies slowest, in B fastest."""

    def load() -> Array:
        import numpy as np

        from lorasurgery.arrays import NUMPY

        factors = site.load()
        if letter == "m":
            data = factors["m"]
        elif site.layout == "embedding":
            data = factors["B" if letter == "A" else "A"].T
        elif site.layout == "experts" and letter == "A":
            data = factors["A"].reshape(-1, factors["A"].shape[2])
        elif site.layout == "experts":
            data = factors["B"].transpose(1, 2, 0).reshape(factors["B"].shape[1], -1)
        else:
            data = factors[letter]
        return np.ascontiguousarray(data).astype(NUMPY[site.factors[letter].dtype], copy=False)

    return load


def _whole(adapter: Adapter, name: str) -> Callable[[], Array]:
    return lambda: adapter.load(name)


def _unscaled(adapter: Adapter, name: str, scaling: float) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        return np.ascontiguousarray(adapter.load_added(name) / np.float32(scaling), np.float32)

    return load


def _depths(sites: Sequence[Site]) -> Mapping[int, int]:
    """How many wrappers lie around each site: parameters of one module nest, the first innermost."""
    stacks: dict[str, list[Site]] = defaultdict(list)
    for site in sites:
        stacks[site.module].append(site)
    depths = {}
    for stack in stacks.values():
        stack.sort(key=lambda s: ("down" in s.parameter, s.parameter))
        depths.update({id(site): len(stack) - 1 - i for i, site in enumerate(stack)})
    return depths


def _by_parameter(site: Site) -> bool:
    return site.layout in ("experts", "parameter")


def owners(adapter: Adapter) -> list[str]:
    """Modules that are kept whole: no factors adapt them."""
    found = {name.rpartition(".")[0] for name in adapter.replaced if not name.endswith(".bias")}
    return sorted(found - {site.module for site in adapter.sites})


def _usual(values: Any, otherwise: Any) -> Any:
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else otherwise


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
