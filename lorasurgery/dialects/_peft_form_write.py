"""Writing the forms of PEFT's types: keys and a config with which PEFT builds the same layers again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.dialects._peft_form_read import Kind
from lorasurgery.dialects._peft_lora_write import PREFIX, Stored, owners, save, wholes
from lorasurgery.errors import FormatError
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array


def write(
    adapter: Adapter,
    folder: Path,
    kind: Kind,
    fields: Mapping[str, Any],
    stored: Callable[[Site], Iterable[tuple[str, tuple[int, ...], Callable[[], Array]]]],
) -> None:
    """`stored` gives of a site each key's end, its shape, and what loads it."""
    if adapter.added:
        raise FormatError(
            f"{adapter.path}: {next(iter(adapter.added))} is added, which PEFT's {kind.name} cannot "
            "say. Merge it, or leave it out."
        )
    tensors: dict[str, Stored] = {}
    for site in adapter.sites:
        for end, shape, load in stored(site):
            key = f"{PREFIX}{site.module}.{end}"
            dtype = _dtype(site)
            tensors[key] = (TensorInfo(key, dtype, shape), _as(dtype, load))
    tensors |= dict(wholes(adapter))
    save(folder, {**config_of(adapter, kind), **fields}, tensors)


def factor(
    site: Site, info: TensorInfo, name: str, *, turned: bool
) -> tuple[tuple[int, ...], Callable[[], Array]]:
    """A factor's shape in the file, and what loads it; `turned`: it lies there on its side."""

    def load() -> Array:
        import numpy as np

        found = site.load()[name]
        return np.ascontiguousarray(found.T if turned else found, np.float32)

    return info.shape[::-1] if turned else info.shape, load


def _dtype(site: Site) -> str:
    """All factors of a site are written in one dtype."""
    return next((info.dtype for info in site.factors.values()), "F32")


def _as(dtype: str, load: Callable[[], Array]) -> Callable[[], Array]:
    def cast() -> Array:
        from lorasurgery.arrays import NUMPY

        return load().astype(NUMPY[dtype], copy=False)

    return cast


def ranks(adapter: Adapter) -> dict[str, Any]:
    """r and alpha: the most common ones, and patterns for the modules that differ."""
    r = {site.module: site.config.rank for site in adapter.sites}
    alpha = {site.module: site.config.scaling * site.config.rank for site in adapter.sites}
    rank, usual = (
        Counter(values.values()).most_common(1)[0][0] if values else 8 for values in (r, alpha)
    )
    return {
        "r": rank,
        "alpha": plain(usual),
        "rank_pattern": {f"^{name}": n for name, n in r.items() if n != rank},
        "alpha_pattern": {f"^{name}": plain(a) for name, a in alpha.items() if a != usual},
    }


def plain(number: float) -> float | int:
    """3.0 as 3."""
    return int(number) if number == int(number) else number


def one_of_all(adapter: Adapter, field: str, otherwise: Any) -> Any:
    """A field that PEFT has once for all modules, and the sites in their configs."""
    values = {site.config.extra.get(field, otherwise) for site in adapter.sites}
    if len(values) > 1:
        raise FormatError(
            f"{adapter.path}: {field} is {' and '.join(sorted(map(str, values)))} in one adapter, for "
            "which PEFT has one field. Write two adapters."
        )
    return values.pop() if values else otherwise


def config_of(adapter: Adapter, kind: Kind) -> dict[str, Any]:
    carried = {"task_type", "revision", "auto_mapping", "peft_version", *kind.fields}
    whole = owners(adapter)
    named = {*whole, *(site.module for site in adapter.sites)}
    alone = [n for n in adapter.replaced if n.rpartition(".")[0] not in named]
    if alone and "bias" not in kind.fields:
        raise FormatError(
            f"{adapter.path}: {alone[0]} is replaced alone, which PEFT's {kind.name} cannot say. "
            "Merge it, or leave it out."
        )
    said: dict[str, Any] = {}
    if "bias" in kind.fields:
        biases = [n for n in adapter.replaced if n.endswith(".bias")]
        trained = [n for n in biases if n.rpartition(".")[0] not in whole]
        said = {"bias": adapter.settings.get("bias", "all") if trained else "none"}
    return {
        "task_type": None,
        "revision": None,
        **{name: value for name, value in adapter.settings.items() if name in carried},
        **said,
        "peft_type": kind.name,
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "target_modules": sorted({site.module for site in adapter.sites}),
        "modules_to_save": whole or None,
    }
