"""AdaLoRA as PEFT stores it.

Keys are base_model.model. + module path + .lora_A [k, in], .lora_E [k, 1], .lora_B [out, k]. After pruning the
config's rank_pattern has init_r booleans for each module: which triplets are left, k of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.dialects import _peft_lora_config as lora
from lorasurgery.dialects._peft_lora_write import PREFIX
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("adalora",)

_KIND = form.Kind(
    "ADALORA",
    {"lora_A": "A", "lora_E": "E", "lora_B": "B"},
    frozenset({
        "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
        "total_step", "bias", *lora.READ, *lora.SILENT,
    }),
    lora.REFUSED,
)  # fmt: skip
_ENDS = {name: end for end, name in _KIND.factors.items()}


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks."""
    masks = _masks(path, config)

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        if problem := form.incomplete(module, keys, "AEB", _KIND):
            return problem
        a, e, b = (keys[name] for name in "AEB")
        mask = masks.get(module)
        rank = _number(path, config, "init_r", 12)
        k = rank if mask is None else sum(mask)
        if (a.shape[:1], e.shape, b.shape[1:]) != ((k,), (k, 1), (k,)):
            return form.unfit(module, keys, _KIND, k)
        if mask is not None and len(mask) != rank:
            return Problem(
                e.name, f"{module}: rank_pattern has {len(mask)} entries, but init_r is {rank}"
            )
        alpha = _number(path, config, "lora_alpha", 8)
        extra: dict[str, object] = {} if mask is None else {"kept": k, "mask": mask}
        said = AdapterConfig("adalora", rank, float(alpha if alpha > 0 else rank), extra=extra)
        facts = {name: TensorInfo(info.name, "F32", info.shape) for name, info in keys.items()}
        turned = bool(config.get("fan_in_fan_out"))
        load = _reader(source, keys)
        return [Site(module, "weight", "linear", said, facts, load, fan_in_fan_out=turned)]

    return form.read(path, config, source, _KIND, sites)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks: one alpha and one init_r for all; E takes up what a site had otherwise."""
    configs = [site.config for site in adapter.sites]
    rank = max((max(c.rank, _kept(c)) for c in configs), default=12)
    alpha = Counter(c.alpha * rank / c.rank for c in configs).most_common(1)[0][0] if configs else 8
    common = AdapterConfig("adalora", rank, alpha)
    pruned = any(_kept(c) != rank for c in configs)
    fields = {
        "init_r": rank,
        "lora_alpha": writing.plain(alpha),
        "fan_in_fan_out": any(site.fan_in_fan_out for site in adapter.sites),
        "rank_pattern": {f"{s.module}.lora_E": _mask(s.config, rank) for s in adapter.sites}
        if pruned
        else None,
        # LoRA's, which mean nothing here, or would narrow the list of modules
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "lora_bias": False,
        "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
        "exclude_modules": None, "target_parameters": None,
    }  # fmt: skip
    if not adapter.settings.get("total_step"):  # which PEFT insists on
        least = min((_kept(c) for c in configs), default=rank) or 1
        fields |= {"total_step": 1, "tinit": 0, "tfinal": 0, "target_r": least}
    writing.write(adapter, folder, _KIND, fields, lambda site: _stored(site, common))


def _stored(
    site: Site, common: AdapterConfig
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    variant = plugins.load("adapters", "adalora")
    times = variant.scale(site.config) / variant.scale(common)

    def loader(name: str) -> Callable[[], Array]:
        def load() -> Array:
            import numpy as np

            factor = site.load()[name]
            if name == "E" and times != 1:
                factor = factor * np.float32(times)
            return np.ascontiguousarray(factor, np.float32)

        return load

    for name, info in site.factors.items():
        yield _ENDS[name], info.shape, loader(name)


def _kept(config: AdapterConfig) -> int:
    left: Any = config.extra.get("kept", config.rank)
    return int(left)


def _mask(config: AdapterConfig, rank: int) -> list[bool]:
    """Which triplets are left: as they were read, or the first."""
    mask: Any = config.extra.get("mask")
    k = _kept(config)
    if mask is not None and len(mask) == rank and sum(mask) == k:
        return list(mask)
    return [True] * k + [False] * (rank - k)


def _masks(path: Path, config: Mapping[str, Any]) -> dict[str, tuple[bool, ...]]:
    """By module; in older files the keys have PEFT's prefix, or the adapter's name at their end."""
    found = {}
    for key, mask in (config.get("rank_pattern") or {}).items():
        if not isinstance(mask, list) or not all(isinstance(one, bool) for one in mask):
            raise FormatError(
                f"{path / 'adapter_config.json'}: rank_pattern of {key!r} is no list of booleans. "
                "Mend it."
            )
        name = key.removeprefix(PREFIX).removesuffix(".default").removesuffix(".lora_E")
        found[name] = tuple(mask)
    return found


def _number(path: Path, config: Mapping[str, Any], field: str, otherwise: int) -> Any:
    value = config.get(field, otherwise)
    if not isinstance(value, int | float) or (field == "init_r" and not value >= 1):
        raise FormatError(
            f"{path / 'adapter_config.json'}: {field} is {value!r}, which is no such number. Mend it."
        )
    return value


def _reader(source: Checkpoint, keys: form.Keys) -> Callable[[], Mapping[str, Array]]:
    return lambda: {name: form.loaded(source, info.name) for name, info in keys.items()}
