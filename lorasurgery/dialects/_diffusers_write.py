"""Writing diffusers' single file: PEFT's keys, and its config for each part in the metadata."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Site
from lorasurgery.dialects import _diffusers_keys, _one_file, _sayable
from lorasurgery.dialects._pair_write import loader, spread
from lorasurgery.dialects._peft_lora_write import Stored, config_of
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_ENDS = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector"}


def write(adapter: Adapter, file: Path, variants: tuple[str, ...]) -> None:
    """All sites, and what is added to biases, a tensor at a time."""
    _sayable.joined(adapter, "diffusers")
    _sayable.check(replace(adapter, added={}), "diffusers", variants)
    parts: dict[str, list[Site]] = defaultdict(list)
    for site in adapter.sites:
        part, module = _diffusers_keys.part_of(site.module)
        parts[part].append(replace(site, module=module))
    if "" in parts and len(parts) > 1:
        raise FormatError(
            f"{adapter.path}: {parts[''][0].module} is below none of the pipeline's parts, and other "
            f"modules are below {', '.join(sorted(filter(None, parts)))}. Write two adapters."
        )
    facts = {}
    for part, sites in parts.items():
        named = {s.module for s in sites}
        one = replace(
            adapter, dialect="diffusers", sites=tuple(sites), added=_added(adapter, part, named)
        )
        for field, value in config_of(one).items():
            facts[f"{part}.{field}" if part else field] = value
    tensors = {info.name: (info, load) for info, load in _tensors(adapter)}
    text = json.dumps(facts, indent=2, sort_keys=True)
    _one_file.write(file, tensors, {"format": "pt", _diffusers_keys.METADATA: text})


def _added(adapter: Adapter, part: str, modules: set[str]) -> dict[str, TensorInfo]:
    return {
        name: info
        for name, info in adapter.added.items()
        if name.removeprefix(f"{part}.").removesuffix(".bias") in modules
    }


def _tensors(adapter: Adapter) -> Iterator[Stored]:
    scalings = {f"{site.module}.bias": site.config.scaling for site in adapter.sites}
    for site in adapter.sites:
        for factor, info in site.factors.items():
            stored = TensorInfo(
                f"{site.module}.{_ENDS[factor]}", info.dtype, _shape(adapter, site, factor)
            )
            yield stored, loader(site, factor, stored)
    for name, info in adapter.added.items():
        if name not in scalings:
            raise FormatError(
                f"{adapter.path}: {name} is added, but no factors adapt its module. Merge it."
            )
        key = f"{name.removesuffix('.bias')}.lora_B.bias"
        yield TensorInfo(key, "F32", info.shape), _unscaled(adapter, name, scalings[name])


def _shape(adapter: Adapter, site: Site, factor: str) -> tuple[int, ...]:
    """PEFT's, whose magnitudes are [out], and of a convolution [1, out, 1, 1]."""
    if factor != "m":
        return spread(site, factor)
    rows, columns = site.factors[factor].shape
    if columns != 1:
        raise FormatError(
            f"{adapter.path}: {site.module} norms each column, and PEFT each row. Merge it."
        )
    return (1, rows, *(1 for _ in site.kernel)) if site.kernel else (rows,)


def _unscaled(adapter: Adapter, name: str, scaling: float) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        return np.ascontiguousarray(adapter.load_added(name) / np.float32(scaling), np.float32)

    return load
