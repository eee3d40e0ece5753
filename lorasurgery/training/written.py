"""What was trained as an Adapter: the layers' factors, as any dialect writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, Site
from lorasurgery.model import open_model
from lorasurgery.operations._right_base import bound, digest
from lorasurgery.report import Result
from lorasurgery.targets import resolve
from lorasurgery.tensors import TensorInfo
from lorasurgery.training.adapted import Adapted, turned
from lorasurgery.training.attach import Detours

if TYPE_CHECKING:
    from torch import Tensor

    from lorasurgery.arrays import Array


def adapter(detours: Detours, base: str, path: Path, settings: Mapping[str, Any]) -> Adapter:
    """Factors are the live tensors; they are copied when a dialect loads them."""
    sites = tuple(_site(name, layer) for name, layer in detours.layers.items())
    whole = {n: TensorInfo(n, "F32", tuple(p.shape)) for n, p in detours.whole.items()}
    return Adapter(
        path=path,
        dialect="peft",
        base=base,
        sites=sites,
        replaced=whole,
        added={},
        load=lambda name: array(detours.whole[name]),
        load_added=lambda name: array(detours.whole[name]),
        settings=settings,
    )


@dataclass(frozen=True, slots=True)
class OnBase:
    """An adapter, bound to its base where it belongs to one, and the base's weights that it is for.

    `results` have a weight's hash, as a merge would note it, and what is told of the module; `names` are the weights'
    by module.
    """

    adapter: Adapter
    results: tuple[Result, ...]
    names: Mapping[str, str]


def on_base(base: Path, adapter: Adapter, figures: Mapping[str, Mapping[str, float]]) -> OnBase:
    """Reads each weight once."""
    model = open_model(base)
    targets = resolve(model, adapter, routed=True).targets
    read = {name: digest(model, name) for name in targets}
    results: list[Result] = []
    names: dict[str, str] = {}
    for name, target in targets.items():
        modules = [share.site.module for share in target.shares]
        names |= dict.fromkeys(modules, name)
        told = {key: value for m in modules for key, value in figures.get(m, {}).items()}
        results.append(Result(name, told, {name: read[name]}, {}))
    by_module = {module: read[name] for module, name in names.items()}
    return OnBase(bound(adapter, by_module), tuple(results), names)


def norms(detours: Detours) -> dict[str, float]:
    """‖ΔW‖ of each module, in the Frobenius norm; a router's mixture has no ΔW."""
    import torch

    with torch.no_grad():
        return {
            path: float(layer.variant.delta(layer.dense(), layer.given, layer.config).norm())
            for path, layer in detours.layers.items()
            if not getattr(layer.variant, "ROUTED", False)
        }


def _site(module: str, layer: Adapted) -> Site:
    factors = layer.given
    infos = {n: TensorInfo(f"{module}.{n}", "F32", tuple(f.shape)) for n, f in factors.items()}
    return Site(
        module, "weight", layer.layout, layer.config, infos, _loader(factors),
        fan_in_fan_out=turned(layer.base),
    )  # fmt: skip


def _loader(factors: Mapping[str, Tensor]) -> Callable[[], Mapping[str, Array]]:
    return lambda: {name: array(factor) for name, factor in factors.items()}


def array(tensor: Tensor) -> Array:
    """Float32, of its own memory."""
    found: Array = tensor.detach().float().cpu().numpy().copy()
    return found
