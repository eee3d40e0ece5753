"""Writing kohya's single file: one scalar alpha a module, which takes in rsLoRA's scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorasurgery.adapter import Adapter, Site
from lorasurgery.dialects import (
    _kohya_names,
    _kohya_others,
    _kohya_products,
    _one_file,
    _sayable,
)
from lorasurgery.dialects._pair_write import loader, spread
from lorasurgery.dialects._peft_lora_write import Stored
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

_ENDS = {"A": "lora_down.weight", "B": "lora_up.weight", "m": "dora_scale"}


def write(adapter: Adapter, file: Path, variants: tuple[str, ...]) -> None:
    """The factors of all sites, a tensor at a time, and the metadata that the file came with."""
    # a bias that another layout adds is nothing that kohya would read
    layouts = ("linear", "channels")
    _sayable.check(adapter, "kohya", variants, layouts, added=adapter.dialect == "kohya")
    tensors: dict[str, Stored] = {}
    several = _kohya_names.has_several_encoders([site.module for site in adapter.sites])
    first = several or adapter.settings.get("text_encoder") == _kohya_names.FIRST
    for site in adapter.sites:
        name = _kohya_names.name_of(site.module, first=first)
        if f"{name}.alpha" in tensors:
            raise FormatError(
                f"{adapter.path}: {site.module} and another module are both {name} with _ for . "
                "Write another dialect."
            )
        tensors |= {info.name: (info, load) for info, load in _tensors(adapter, site, name)}
    for name in adapter.added:
        module, _, parameter = name.rpartition(".")
        normed = f"{module}.weight" in adapter.added
        end = "w_norm" if parameter == "weight" else "b_norm" if normed else "diff_b"
        key = f"{_kohya_names.name_of(module, first=first)}.{end}"
        info = TensorInfo(key, "F32", adapter.added[name].shape)
        tensors[key] = (info, partial(adapter.load_added, name))
    _one_file.write(file, tensors, _metadata(adapter))


def _metadata(adapter: Adapter) -> dict[str, str]:
    found = adapter.settings.get("metadata", {}) if adapter.dialect == "kohya" else {}
    base = {"ss_sd_model_name": adapter.base} if adapter.base else {}
    return {"format": "pt", **base, **found}


def _tensors(adapter: Adapter, site: Site, name: str) -> Iterator[Stored]:
    variant = site.config.variant
    if variant == "decomposed":
        variant = str(site.config.extra.get("of", "loha"))
    if site.config.extra.get("full"):
        yield from _kohya_others.whole(site, name)
        return
    if variant in _kohya_others.FORMS and variant != "lokr":
        yield from _kohya_others.stored(site, name)
        return
    unscaled = _kohya_products.unscaled(variant, site.factors)
    alpha = 1.0 if unscaled else site.config.scaling * site.config.rank
    if variant in _kohya_products.FACTORS:
        if site.config.extra.get("last_dimensions"):
            raise FormatError(
                f"{adapter.path}: {site.module} is PEFT's LoKr of a Conv1d, which LyCORIS multiplies "
                "out otherwise. Convert it to LoRA."
            )
        ends = {f: end for end, f in _kohya_products.FACTORS[variant].items()}
        for factor, info in site.factors.items():
            if factor == "m":
                more = int(str(site.config.extra.get("dimensions", 2))) - 2
                shape = (*info.shape, *(1 for _ in range(more)))
                stored = TensorInfo(f"{name}.dora_scale", info.dtype, shape)
                yield stored, loader(site, factor, stored)
                continue
            turned = _kohya_products.sideways(variant, factor, site.factors)
            shape = info.shape[::-1] if turned else info.shape
            scale = site.config.scaling if unscaled and factor == "W1" else 1.0
            stored = TensorInfo(f"{name}.{ends[factor]}", info.dtype, shape)
            yield stored, loader(site, factor, stored, scale=scale, turned=turned)
    else:
        for factor, info in site.factors.items():
            if factor == "m" and site.kernel and info.shape[1] != 1:
                raise FormatError(
                    f"{adapter.path}: {site.module} norms each column of a convolution, which LyCORIS does "
                    "not. Merge it."
                )
            stored = TensorInfo(f"{name}.{_ENDS[factor]}", info.dtype, spread(site, factor))
            yield stored, loader(site, factor, stored)
    yield TensorInfo(f"{name}.alpha", "F32", ()), _number(alpha)


def _number(value: float) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        return np.array(value, np.float32)

    return load
