"""What the forms of PEFT's types have in common: keys by module, whole tensors, and a config to check."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_lora_config
from lorasurgery.dialects._peft_lora import _WRAPPED, _brief, wholes_of
from lorasurgery.dialects._peft_lora_write import PREFIX
from lorasurgery.errors import MatchError
from lorasurgery.plugins import suggestion
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

# fields that each of PEFT's types has
_SHARED = {
    "peft_type", "base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version",
    "revision", "task_type", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "modules_to_save", "runtime_config",
}  # fmt: skip

# a factor's name, as the variant has it -> its key and facts
Keys: TypeAlias = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Kind:
    """One of PEFT's types: what its keys end with, and what its config says."""

    name: str  # LOHA
    factors: Mapping[str, str]  # what a key ends with -> the factor's name: hada_w1_a -> B1
    fields: frozenset[str]  # of the config, beside those that each type has
    # fields that change what the factors mean, and why they are not understood
    refused: Mapping[str, str] = field(default_factory=dict)


def read(
    path: Path,
    config: Mapping[str, Any],
    source: Checkpoint,
    kind: Kind,
    sites_of: Callable[[str, Keys], Sequence[Site] | Problem],
) -> Adapter:
    """The adapter; `sites_of` makes of a module and its keys what they do, or says why they cannot."""
    problems = check(path / "adapter_config.json", config, kind)
    groups, whole = _sort(source, kind.factors)
    sites: list[Site] = []
    for module, keys in groups.items():
        first = next(iter(keys.values())).name
        if not _peft_lora_config.targeted(config, module):
            targets = _brief(config.get("target_modules"))
            problems.append(
                Problem(
                    first, f"{first}: the config's target_modules {targets} do not name {module}"
                )
            )
            continue
        found = sites_of(module, keys)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            sites += found
    replaced, strangers = wholes_of(source, config, whole, kind.name)
    problems += strangers
    return Adapter(
        path=path,
        dialect="peft",
        base=config.get("base_model_name_or_path"),
        sites=tuple(sites),
        replaced={n: replace(source.info(key), name=n) for n, key in replaced.items()},
        added={},
        load=lambda name: source.read(replaced[name]),
        load_added=source.read,
        settings=config,
        problems=tuple(problems),
    )


def check(path: Path, config: Mapping[str, Any], kind: Kind) -> list[Problem]:
    """The fields that nobody knows. Raises what no flag allows: a changed meaning."""
    for name, reason in kind.refused.items():
        if config.get(name):
            raise MatchError(
                f"{path}: {name} is {config[name]!r}: {reason}. Merge it with PEFT itself."
            )
    known = {*_SHARED, *kind.fields, *kind.refused}
    return [
        Problem(name, f"config field {name!r} is unknown. {suggestion(name, sorted(known))[:-1]}")
        for name, value in config.items()
        if name not in known and value not in (None, False, [], {}, "")
    ]


def site_config(config: Mapping[str, Any], module: str, variant: str) -> AdapterConfig:
    """Rank and alpha of a module, where the config calls them r and alpha and has patterns for them."""
    named = {**config, "lora_alpha": config.get("alpha", 8), "use_rslora": False}
    return replace(_peft_lora_config.site_config(named, module), variant=variant)


def incomplete(module: str, keys: Keys, wanted: Iterable[str], kind: Kind) -> Problem | None:
    """A problem where a module lacks one of its factors."""
    lacking = [name for name in wanted if name not in keys]
    if not lacking:
        return None
    ends = {name: end for end, name in kind.factors.items()}
    first = next(iter(keys.values())).name
    missing = " and ".join(ends[name] for name in lacking)
    return Problem(first, f"{first} is not enough: {missing} of {module} is missing")


def unfit(module: str, keys: Keys, kind: Kind, rank: int) -> Problem:
    """Factors whose shapes do not go together."""
    ends = {name: end for end, name in kind.factors.items()}
    shapes = ", ".join(f"{ends[name]} {list(info.shape)}" for name, info in keys.items())
    return Problem(
        next(iter(keys.values())).name,
        f"{module}: {shapes} are no factors of rank {rank}, which the config gives this module",
    )


def loaded(source: Checkpoint, key: str) -> Array:
    """A factor as it is stored, float32."""
    import numpy as np

    return source.read(key).astype(np.float32)


def _sort(
    source: Checkpoint, factors: Mapping[str, str]
) -> tuple[dict[str, dict[str, TensorInfo]], list[str]]:
    """Keys of factors by the module they adapt, and the keys of all other tensors."""
    groups: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    whole = []
    for key in source:
        path = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".default")
        owner, _, end = path.rpartition(".")
        if end in factors:
            groups[_WRAPPED.sub("", owner)][factors[end]] = source.info(key)
        else:
            whole.append(key)
    return groups, whole
