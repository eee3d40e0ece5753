"""Writing our own layout, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, Site
from lorasurgery.errors import FormatError
from lorasurgery.formats import safetensors
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
FORMAT, VERSION = "lorasurgery-adapter", 1


def write(adapter: Adapter, folder: Path) -> None:
    """Raises FormatError for a shared pair that differs, or a Delta-LoRA that names no base."""
    tensors: dict[str, tuple[TensorInfo, Callable[[], Array]]] = {}
    sites = []
    for site in adapter.sites:
        _check(adapter, site)
        keys = {name: _key(site, name) for name in site.factors}
        for name, key in keys.items():
            info = TensorInfo(key, "F32", site.factors[name].shape)
            if key in tensors:
                _check_shared(adapter, site, tensors[key], (info, _factor(site, name)))
            tensors.setdefault(key, (info, _factor(site, name)))
        sites.append(_entry(site, keys))
    wholes = {"replaced": adapter.replaced, "added": adapter.added}
    for kind, infos in wholes.items():
        load = adapter.load if kind == "replaced" else adapter.load_added
        for name, info in infos.items():
            key = f"{kind}.{name}"
            tensors[key] = (TensorInfo(key, info.dtype, info.shape), _whole(load, name))
    config = {
        "format": FORMAT, "version": VERSION, "base_model_name_or_path": adapter.base,
        "sites": sites, **{kind: {n: f"{kind}.{n}" for n in of} for kind, of in wholes.items()},
    }  # fmt: skip
    header = safetensors.header_of([info for info, _ in tensors.values()], {"format": "pt"})
    with (folder / WEIGHTS).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for info, read in tensors.values():
            data = read()
            assert data.nbytes == info.nbytes, info
            file.write(data.tobytes())
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def _entry(site: Site, keys: dict[str, str]) -> dict[str, Any]:
    config = site.config
    return {
        "module": site.module, "parameter": site.parameter, "layout": site.layout,
        "variant": config.variant, "rank": config.rank, "alpha": config.alpha,
        "rank_stabilized": config.rank_stabilized, "fan_in_fan_out": site.fan_in_fan_out,
        "kernel": list(site.kernel), "extra": dict(config.extra), "factors": keys,
    }  # fmt: skip


def _key(site: Site, name: str) -> str:
    shared = site.config.extra.get("shared")
    return f"shared.{shared}.{name}" if shared else f"{site.module}.{site.parameter}.{name}"


def _check(adapter: Adapter, site: Site) -> None:
    bound = getattr(plugins.load("adapters", site.config.variant), "BOUND", False)
    if bound and not site.config.extra.get("base"):
        raise FormatError(
            f"{adapter.path}: {site.module} is a Delta-LoRA without the hash of its base: on another "
            "one its factors are wrong. Say extra['base']."
        )


def _check_shared(
    adapter: Adapter,
    site: Site,
    one: tuple[TensorInfo, Callable[[], Array]],
    other: tuple[TensorInfo, Callable[[], Array]],
) -> None:
    import numpy as np

    if one[0] != other[0] or not np.array_equal(one[1](), other[1]()):
        raise FormatError(
            f"{adapter.path}: {site.module} shares {one[0].name}, but its own differs. Give it a name "
            "of its own."
        )


def _factor(site: Site, name: str) -> Callable[[], Array]:
    def load() -> Array:
        import numpy as np

        return np.ascontiguousarray(site.load()[name], np.float32)

    return load


def _whole(load: Callable[[str], Array], name: str) -> Callable[[], Array]:
    return lambda: load(name)
