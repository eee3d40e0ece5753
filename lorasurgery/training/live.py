"""An adapter on disk laid upon a live model, by the rules by which it is laid upon files, and not merged.

Linear layers and embeddings get the variant's detour. Where a variant has none, and what has no module of its own
(stacked experts, biases) or is seen otherwise (convolutions), is changed in place, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lorasurgery.change import widened
from lorasurgery.model import Model, open_model
from lorasurgery.operations._adapters import open_adapter
from lorasurgery.operations._right_base import check_base
from lorasurgery.problems import refuse
from lorasurgery.target import Share, Target
from lorasurgery.targets import Whole, completed, resolve, unmatched
from lorasurgery.tensors import TensorInfo
from lorasurgery.training.adapted import Adapted, sides, turned, unpacks, wrap
from lorasurgery.training.blocks import connect
from lorasurgery.training.written import array
from lorasurgery.weights import Weights


class LiveWeights:
    """A live model's parameters with their names and shapes, as a checkpoint's weights are seen."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {
            name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)
        }
        for name, module in model.named_modules():
            if unpacks(module):
                self._shapes[f"{name}.weight"] = sides(module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, "F32", self._shapes[name])


def add_adapter(live: Any, base: Path, path: Path) -> dict[str, Adapted]:
    """Lay the adapter at `path` upon transformers' model of `base`; the layers by their paths.

    Raises FormatError and MatchError as a merge does.
    """
    stored = open_model(base)
    adapter = completed(stored, open_adapter(path))
    check_base(stored, resolve(stored, adapter))
    weights = cast(Weights, LiveWeights(live))
    seen = Model(base, stored.stored, weights, live.config.to_dict())
    resolved = resolve(seen, adapter, routed=True)
    refuse(adapter.path, [*resolved.problems, *unmatched(seen, resolved)], ())
    for name, whole in resolved.replaced.items():
        _replace(live, name, whole)
    for name, wholes in resolved.added.items():
        for whole in wholes:
            _add(live.get_parameter(name), torch.from_numpy(whole.load()))
    return lay(live, list(resolved.targets.values()))


def lay(live: nn.Module, targets: list[Target]) -> dict[str, Adapted]:
    """Put each target's change where it belongs."""
    layers = {}
    for target in targets:
        owner, _, parameter = target.tensor.rpartition(".")
        module = live.get_submodule(owner)
        if _has_detour(module, parameter, target.shares):
            layers[owner] = _beside(live, owner, target.shares[0])
        else:
            held = live.get_parameter(target.tensor)
            _add(held, _change(target, held))
    connect(layers)
    return layers


def _has_detour(module: nn.Module, parameter: str, shares: tuple[Share, ...]) -> bool:
    if parameter != "weight" or len(shares) != 1 or shares[0].turned != turned(module):
        return False
    linear = isinstance(module, nn.Linear) or turned(module) or unpacks(module)
    return isinstance(module, nn.Embedding) or (linear and hasattr(shares[0].variant, "detour"))


def _beside(live: nn.Module, owner: str, share: Share) -> Adapted:
    module = live.get_submodule(owner)
    device = cast(torch.Tensor, module.weight).device
    factors = {n: torch.from_numpy(f).to(device) for n, f in share.site.load().items()}
    layer = wrap(module, share.site.config, factors).train(module.training)
    parent, _, child = owner.rpartition(".")
    setattr(live.get_submodule(parent), child, layer)
    return layer


def _change(target: Target, held: torch.Tensor) -> torch.Tensor:
    before = widened(array(held))
    total = before.copy()
    for share in target.shares:
        total += share.dense(total)
    return torch.from_numpy((total - before).reshape(held.shape))


def _add(parameter: torch.Tensor, change: torch.Tensor) -> None:
    with torch.no_grad():
        wide = parameter.float() + change.to(parameter.device)
        parameter.copy_(wide)


def _replace(live: nn.Module, name: str, whole: Whole) -> None:
    """A parameter of its own, where the base ties it to another."""
    owner, _, parameter = name.rpartition(".")
    module = live.get_submodule(owner)
    old = live.get_parameter(name)
    data = torch.from_numpy(whole.load().copy()).to(old.device, old.dtype)
    module.register_parameter(parameter, nn.Parameter(data, requires_grad=False))
