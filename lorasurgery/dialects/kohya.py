"""kohya's and LyCORIS' single safetensors file: LoRA (LoCon), DoRA, LoHa, LoKr and others (see _kohya_others.py).

Keys are a module's joined name (see _kohya_names.py) + `.lora_down.weight` [r, in, *kernel], `.lora_up.weight`
[out, r, 1, 1], `.lora_mid.weight` [r, r, *kernel], `.dora_scale` [out, 1, ...] or [1, in, ...], `.hada_*`,
`.lokr_*`, and `.alpha`, a scalar; missing or 0 it is the rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import (
    _kohya_names,
    _kohya_others,
    _kohya_products,
    _kohya_write,
    _one_file,
    _pair,
)
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

VARIANTS = ("lora", "dora", "loha", "lokr", "decomposed", "diag_oft", "glora", "ia3")

_PAIR = {
    "lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "core", "dora_scale": "m",
    "alpha": "alpha",
}  # fmt: skip
# what stands beside the factors of a LoHa or LoKr
_BESIDE = {"alpha", "dora_scale"}
_FORMS = (*_kohya_products.FACTORS.values(), *_kohya_others.FORMS.values())
_ENDS = {*_PAIR, *_kohya_others.ADDED, *(end for ends in _FORMS for end in ends)}


def detect(path: Path) -> bool:
    """One .safetensors file, in which a key is a known prefix, a path without dots, and a factor's end."""
    file = _one_file.find(path, ".safetensors")
    if file is None:
        return False
    keys = (key.partition(".") for key in _one_file.opened(file, ".safetensors"))
    return any(name.startswith(_kohya_names.PREFIXES) and end in _ENDS for name, _, end in keys)


def read(path: Path) -> Adapter:
    """The adapter's sites; headers and alphas are read, factors when a site loads."""
    source = _one_file.opened(path, ".safetensors")
    modules, problems = _sort(source)
    sites, added = [], {}
    for name, all_ends in modules.items():
        module = _kohya_names.module_of(name)
        ends = {end: key for end, key in all_ends.items() if end not in _kohya_others.ADDED}
        for end in all_ends.keys() - ends.keys():
            added[f"{module}.{_kohya_others.ADDED[end]}"] = all_ends[end]
        if not ends:
            continue
        found = _site(source, name, ends)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sites.append(found)
    settings: dict[str, object] = {"metadata": dict(source.metadata)}
    if any(name.startswith(_kohya_names.FIRST) for name in modules):
        settings["text_encoder"] = _kohya_names.FIRST
    return Adapter(
        path=path,
        dialect="kohya",
        base=source.metadata.get("ss_sd_model_name"),
        sites=tuple(sites),
        replaced={},
        added={n: TensorInfo(n, "F32", source.info(key).shape) for n, key in sorted(added.items())},
        load=_one_file.nothing,
        load_added=lambda name: form.loaded(source, added[name]),
        settings=settings,
        problems=tuple(problems),
    )


def write(adapter: Adapter, folder: Path) -> None:
    """lora.safetensors. Raises FormatError for what these keys cannot say."""
    _kohya_write.write(adapter, folder / "lora.safetensors", VARIANTS)


def _sort(source: Checkpoint) -> tuple[dict[str, dict[str, str]], list[Problem]]:
    """Joined name -> key's end -> key; and a problem for each key that is no such thing."""
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    problems = []
    for key in source:
        name, _, end = key.partition(".")
        if _kohya_names.module_of(name) is None:
            known = ", ".join(_kohya_names.PREFIXES)
            problems.append(Problem(key, f"{key} begins with none of {known}"))
        elif end not in _ENDS:
            info = source.info(key)
            problems.append(
                Problem(key, f"{key} {info.dtype} {list(info.shape)} is no factor that is known")
            )
        else:
            modules[name][end] = key
    return modules, problems


def _site(source: Checkpoint, name: str, ends: Mapping[str, str]) -> Site | Problem:
    module = _kohya_names.module_of(name)
    assert module is not None
    other = _kohya_others.site(source, module, ends, lambda rank: _alpha(source, ends, rank))
    if other is not None:
        return other
    for variant, factors in _kohya_products.FACTORS.items():
        roles = {factors[end]: key for end, key in ends.items() if end in factors}
        if roles and len(roles) < len(ends.keys() - _BESIDE):
            strange = min(end for end in ends if end not in factors and end not in _BESIDE)
            raise MatchError(
                f"{ends[strange]}: stands beside factors of a {variant}, and nobody here knows what "
                "the two mean together. Merge it with LyCORIS."
            )
        if roles:
            plain = _kohya_products.site(
                source, module, variant, roles, lambda rank: _alpha(source, ends, rank)
            )
            if isinstance(plain, Problem) or "dora_scale" not in ends:
                return plain
            return _kohya_products.decomposed(source, plain, ends["dora_scale"])
    roles = {_PAIR[end]: key for end, key in ends.items() if end != "alpha"}
    if not roles:
        return Problem(ends["alpha"], f"{ends['alpha']} stands alone: {name} has no factors")
    rank = (*source.info(roles["A"]).shape, 1)[0] if "A" in roles else 1
    variant = "dora" if "m" in roles else "lora"
    config = AdapterConfig(variant, rank, _alpha(source, ends, rank))
    return _pair.site(source, module, roles, config, by_row=False)


def _alpha(source: Checkpoint, ends: Mapping[str, str], rank: int) -> float:
    """The file's alpha; the rank where it is missing or 0, as LyCORIS and kohya have it."""
    if "alpha" not in ends:
        return float(rank)
    info = source.info(ends["alpha"])
    alpha = float(source.read(info.name).reshape(-1)[0]) if info.numel == 1 else math.nan
    if not math.isfinite(alpha):
        raise FormatError(
            f"{source.path}: {info} is no finite number, as an alpha must be. Restore the file."
        )
    return alpha or float(rank)
