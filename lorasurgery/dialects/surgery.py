"""Our own layout, for the variants that no trainer has a file for: adapter.json and adapter.safetensors.

adapter.json, version 1:

    {"format": "lorasurgery-adapter", "version": 1, "base_model_name_or_path": null,
     "sites": [{"module": "model.layers.0.self_attn.q_proj", "parameter": "weight", "layout": "linear",
                "variant": "delta_lora", "rank": 8, "alpha": 16.0, "rank_stabilized": false,
                "fan_in_fan_out": false, "kernel": [], "extra": {"lambda": 2.0, "base": "blake3:..."},
                "factors": {"A": KEY, "B": KEY, "A0": KEY, "B0": KEY}}, ...],
     "replaced": {"lm_head.weight": KEY}, "added": {"model.layers.0.self_attn.q_proj.bias": KEY}}

A KEY names a tensor of adapter.safetensors, which is stored float32 as the variant has it (A [r, in], B [out, r]);
several sites may name one: that is how LoRA-drop's shared pair is shared. extra is the variant's own:
`lambda` and `start` of Delta-LoRA; `shared`, the pair's name, of LoRA-drop; `experts`, `top_k` and, if measured,
`gate_means` (a list of as many shares) of MoRAL, and `router`, the module whose gates a site without a router has. `base` is the blake3 of the weight (as numbers, not as codes)
that the factors belong to: another one is refused.
What is in `added` is scaled already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site, Variant
from lorasurgery.checkpoint import Checkpoint, open_file, read_json
from lorasurgery.dialects import _surgery_write
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("lora", "dora", "lora_rowscale", "delta_lora", "lora_drop", "moral")

CONFIG, WEIGHTS = _surgery_write.CONFIG, _surgery_write.WEIGHTS
_FIELDS = {
    "module": str, "parameter": str, "layout": str, "variant": str, "rank": int, "alpha": float | int,
    "rank_stabilized": bool, "fan_in_fan_out": bool, "kernel": list, "extra": dict, "factors": dict,
}  # fmt: skip


def detect(path: Path) -> bool:
    """A directory whose adapter.json says so."""
    if not (path / CONFIG).is_file():
        return False
    return read_json(path / CONFIG).get("format") == _surgery_write.FORMAT


def read(path: Path) -> Adapter:
    """Raises FormatError for a version or a field that is not understood."""
    config = read_json(path / CONFIG)
    if config.get("version") != _surgery_write.VERSION:
        raise FormatError(
            f"{path / CONFIG}: version {config.get('version')!r}, but {_surgery_write.VERSION} is read "
            "here. Take a newer lorasurgery."
        )
    if not (path / WEIGHTS).is_file():
        raise FormatError(f"{path}: {CONFIG} stands alone. {WEIGHTS} is missing; restore it.")
    source = open_file(path / WEIGHTS)
    problems: list[Problem] = []
    sites = []
    for entry in config.get("sites", []):
        found = _site(path, source, entry)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sites.append(found)
    replaced, added = (
        _named(path, source, config.get(field, {})) for field in ("replaced", "added")
    )
    known = {key for entry in config.get("sites", []) for key in entry["factors"].values()}
    known |= {*replaced.values(), *added.values()}
    problems += [
        Problem(key, f"{key} is a tensor that {CONFIG} does not name")
        for key in source
        if key not in known
    ]
    return Adapter(
        path=path,
        dialect="surgery",
        base=config.get("base_model_name_or_path"),
        sites=tuple(sites),
        replaced={n: replace(source.info(key), name=n) for n, key in replaced.items()},
        added={n: replace(source.info(key), name=n) for n, key in added.items()},
        load=lambda name: source.read(replaced[name]),
        load_added=lambda name: source.read(added[name]),
        settings=config,
        problems=tuple(problems),
    )


def write(adapter: Adapter, folder: Path) -> None:
    """The two files into an empty directory. Raises FormatError for what they cannot say."""
    _surgery_write.write(adapter, folder)


def _site(path: Path, source: Checkpoint, entry: Mapping[str, Any]) -> Site | Problem:
    wrong = [f for f, kind in _FIELDS.items() if not isinstance(entry.get(f), kind)]
    if wrong or set(entry) - set(_FIELDS):
        field = (wrong or sorted(set(entry) - set(_FIELDS)))[0]
        raise FormatError(
            f"{path / CONFIG}: a site's {field} is {entry.get(field)!r}, which is not understood. Mend it."
        )
    config = AdapterConfig(
        entry["variant"], entry["rank"], float(entry["alpha"]), entry["rank_stabilized"],
        entry["extra"],
    )  # fmt: skip
    keys = _named(path, source, entry["factors"])
    facts = {name: TensorInfo(key, "F32", source.info(key).shape) for name, key in keys.items()}
    site = Site(
        entry["module"], entry["parameter"], entry["layout"], config, facts, _loader(source, keys),
        tuple(entry["kernel"]), entry["fan_in_fan_out"],
    )  # fmt: skip
    return _misfit(site) or site


def _misfit(site: Site) -> Problem | None:
    variant = cast(Variant, plugins.load("adapters", site.config.variant))
    found = {name: list(info.shape) for name, info in site.factors.items()}
    first = next(iter(site.factors.values())).name if site.factors else site.module
    if not {"A", "B"} <= found.keys():
        return Problem(
            first, f"{site.module}: {', '.join(found)} are no factors of {site.config.variant}"
        )
    out, in_ = site.factors["B"].shape[-2], site.factors["A"].shape[-1]
    wanted = {n: list(s) for n, s in variant.shapes(out, in_, site.config).items()}
    if found == wanted or (site.layout == "embedding" and found.keys() == wanted.keys()):
        return None
    return Problem(
        first,
        f"{site.module}: factors {found}, but a {site.config.variant} of this config has {wanted}",
    )


def _named(path: Path, source: Checkpoint, names: Mapping[str, str]) -> dict[str, str]:
    for name, key in names.items():
        if key not in source:
            raise FormatError(
                f"{path / CONFIG}: {name} is {key!r}, which {WEIGHTS} does not have. Restore the file."
            )
    return dict(names)


def _loader(source: Checkpoint, keys: Mapping[str, str]) -> Callable[[], Mapping[str, Array]]:
    def load() -> dict[str, Array]:
        import numpy as np

        return {name: source.read(key).astype(np.float32) for name, key in keys.items()}

    return load
