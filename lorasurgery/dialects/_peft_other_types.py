"""PEFT's types whose formulas are PEFT's alone: one form for all, merged by its own layers.

Listed are those that change weights and nothing else, each held against merge_and_unload in tests/oracles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_lora_config, _peft_other_complete
from lorasurgery.dialects._peft_lora import _ORIGINAL, _WRAPPED, _expected, _facts
from lorasurgery.dialects._peft_lora_write import PREFIX, Stored, save, wholes
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("peft_bridge",)

# what each type keeps once for all modules: a part of its keys
TYPES: Mapping[str, tuple[str, ...]] = {
    "BOFT": (), "HRA": (), "FOURIERFT": (), "MISS": (), "SHIRA": (), "HIRA": (), "C3A": (), "DELORA": (),
    "GRALORA": (), "WAVEFT": (), "PSOFT": (), "PEANUT": (), "OSF": (), "DEFT": (), "ROAD": (), "GLORA": (),
    "SUPERTUNING": (), "TRAINABLE_TOKENS": (), "LN_TUNING": (), "BEFT": (),
    "VBLORA": ("vblora_vector_bank",), "UNILORA": ("unilora_theta_d",), "TINYLORA": ("tinylora_v",),
    "RANDLORA": ("randlora_A", "randlora_B"), "PVERA": ("pvera_A", "pvera_B"),
    "FROD": ("frod_V", "frod_s_indices", "frod_s_size"),
}  # fmt: skip
# keys that hold no factors: a whole tensor, and what is added to a bias
_WHOLE, _ADDED = ".ln_tuning_layers.", ".beft_bias"
_TOKENS = ".trainable_tokens_delta"
_THETA = "base_model.unilora_theta_d"


@dataclass(slots=True)
class _Keys:
    """A file's keys, by what they are."""

    modules: dict[str, dict[str, TensorInfo]] = field(default_factory=lambda: defaultdict(dict))
    shared: dict[str, TensorInfo] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks. Raises UsageError where peft is not installed."""
    kind = str(config["peft_type"]).upper()
    known = fields(plugins.load("adapters", "peft_bridge").config_class(kind))
    spoken = form.Kind(kind, {}, frozenset(f.name for f in known))
    keys = _sort(config, source, TYPES[kind])
    problems = [Problem(k, f"{k} {_facts(source, k)} is no part of a {kind}") for k in keys.strange]
    replaced, added = keys.replaced, keys.added
    adapter = Adapter(
        path=path,
        dialect="peft",
        base=config.get("base_model_name_or_path"),
        sites=tuple(
            site
            for module, of in keys.modules.items()
            for site in _sites(source, config, module, {**of, **keys.shared})
        ),
        replaced={n: replace(source.info(key), name=n) for n, key in replaced.items()},
        added={n: TensorInfo(n, "F32", (source.info(key).numel,)) for n, key in added.items()},
        load=lambda name: source.read(replaced[name]),
        load_added=lambda name: form.loaded(source, added.get(name, name)).reshape(-1),
        settings=config,
        problems=(*form.check(path / "adapter_config.json", config, spoken), *problems),
    )
    return _peft_other_complete.incomplete(adapter, source, keys.shared)


def write(adapter: Adapter, folder: Path) -> None:
    """The keys and the config that were read; nothing else makes such an adapter."""
    kind = str(adapter.settings.get("peft_type"))
    if kind not in TYPES:
        raise FormatError(
            f"{adapter.path}: its config says no type that PEFT's layers could be made of. Write it "
            "as it was read."
        )
    tensors: dict[str, Stored] = {}
    for site in adapter.sites:
        for name, info in site.factors.items():
            tensors[info.name] = (info, _one(site, name, info))
    for stored, (info, load) in wholes(adapter):
        key, (owner, _, parameter) = stored, stored.removeprefix(PREFIX).rpartition(".")
        if kind == "LN_TUNING" and _peft_lora_config.targeted(adapter.settings, owner):
            key = f"{PREFIX}{owner}{_WHOLE}{parameter}"
        tensors[key] = (replace(info, name=key), load)
    for name, info in adapter.added.items():
        key = f"{PREFIX}{name.removesuffix('.bias')}{_ADDED}"
        tensors[key] = (TensorInfo(key, "F32", (1, info.numel)), _added(adapter, name))
    if kind == "UNILORA" and not adapter.sites:  # only the base tells its modules
        info = TensorInfo(_THETA, "F32", (int(adapter.settings["theta_d_length"]),))
        tensors[_THETA] = (info, lambda: adapter.load_added(_THETA))
    drawn = {"save_indices": True} if kind == "UNILORA" and adapter.sites else {}
    save(folder, {**adapter.settings, **drawn}, tensors)


def _one(site: Site, name: str, info: TensorInfo) -> Callable[[], Array]:
    from lorasurgery.arrays import NUMPY

    return lambda: site.load()[name].astype(NUMPY[info.dtype])


def _added(adapter: Adapter, name: str) -> Callable[[], Array]:
    return lambda: adapter.load_added(name).reshape(1, -1)


def _sort(config: Mapping[str, Any], source: Checkpoint, shared: tuple[str, ...]) -> _Keys:
    found = _Keys()
    for key in source:
        name = _WRAPPED.sub("", key.removeprefix(PREFIX))
        # tied to the embedding that is targeted, others are written with its rows
        module = name.removesuffix(_TOKENS) if name.endswith(_TOKENS) else _module(config, name)
        if _ORIGINAL in key and key.replace(_ORIGINAL, ".") in source:
            continue
        if module and _WHOLE in name:
            found.replaced[name.replace(_WHOLE, ".")] = key
        elif module and name.endswith(_ADDED):
            found.added[f"{module}.bias"] = key
        elif module and ".base_layer." not in key:
            found.modules[module][name.removeprefix(f"{module}.")] = source.info(key)
        elif any(part in shared for part in key.split(".")):
            found.shared[f"/{key}"] = source.info(key)
        elif _expected(config, name):
            found.replaced[name] = key
        else:
            found.strange.append(key)
    return found


def _module(config: Mapping[str, Any], name: str) -> str | None:
    """The adapted module that a key lies below."""
    parts = name.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    return next((path for path in paths if _peft_lora_config.targeted(config, path)), None)


def _sites(
    source: Checkpoint, config: Mapping[str, Any], module: str, keys: Mapping[str, TensorInfo]
) -> list[Site]:
    """What is done to the module's weight, and to its bias by those types that change it too."""

    def load() -> dict[str, Array]:
        import numpy as np

        read = {name: np.array(source.read(info.name)) for name, info in keys.items()}
        # indices stay what they are
        return {n: f if f.dtype.kind in "iu" else f.astype(np.float32) for n, f in read.items()}

    kind = str(config["peft_type"]).upper()
    biased = any(name.startswith(("glora_C.X", "glora_D.X", "glora_E.X")) for name in keys)
    facts = {"settings": config, "module": module, "biased": biased}
    layout = "linear"
    if kind == "TRAINABLE_TOKENS" or any("_embedding_" in name for name in keys):
        facts["embedding"], layout = True, "embedding"
    turned = bool(config.get("fan_in_fan_out"))
    said = AdapterConfig("peft_bridge", 1, 1.0, extra=facts)
    weight = Site(module, "weight", layout, said, keys, load, fan_in_fan_out=turned)
    if kind != "ROAD" and not biased:
        return [weight]
    said = replace(said, extra={**facts, "bias": True})
    return [
        weight,
        replace(weight, parameter="bias", layout="parameter", config=said, optional=not biased),
    ]
