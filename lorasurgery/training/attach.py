"""Which modules of a live model are adapted, and factors put beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from lorasurgery.dialects import _peft_lora_config as peft
from lorasurgery.errors import MatchError, UsageError
from lorasurgery.plugins import suggestion
from lorasurgery.training.adapted import Adapted, turned, unpacks, wrap
from lorasurgery.training.method import Factors, Named, Place

if TYPE_CHECKING:
    from lorasurgery.adapter import AdapterConfig

_ROLES = {"A": "A", "B": "B", "m": "magnitude", "b": "vector", "d": "vector", "E": "vector",
          "router": "router"}  # fmt: skip
# the classifier of a model for sequences, by PEFT's names
HEADS = ("classifier", "score")


@dataclass(frozen=True, slots=True)
class Targets:
    """Which modules, by PEFT's rules: ends of paths, or one regular expression over the whole path."""

    modules: tuple[str, ...] = ()  # none: every linear layer but the head
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    whole: tuple[str, ...] = ()  # modules that are trained themselves, without factors

    @property
    def config(self) -> dict[str, Any]:
        """The fields of PEFT's config that say the same."""
        return {
            "target_modules": _names(self.modules, "--target-modules") or "all-linear",
            "exclude_modules": _names(self.exclude, "--exclude-modules"),
            "layers_to_transform": list(self.layers) or None,
            "modules_to_save": list(self.whole) or None,
        }


def _names(given: Sequence[str], flag: str) -> list[str] | str | None:
    """Names as a list; one word that no module can be called is a regular expression. Raises UsageError."""
    if len(given) != 1 or not re.search(r"[^\w.\-]", given[0]):
        return list(given) or None
    try:
        re.compile(given[0])
    except re.error as error:
        raise UsageError(
            f"{flag} {given[0]}: is no name and no regular expression ({error}). Mend it."
        ) from None
    return given[0]


def places(model: nn.Module, targets: Targets) -> list[Place]:
    """In the model's order. Raises MatchError where nothing fits, UsageError for what cannot be adapted."""
    config = targets.config
    every = config["target_modules"] == "all-linear"
    if targets.layers and every:
        config["target_modules"] = ".*"  # PEFT's rule for layers needs names, and these are all
        config["target_modules"] = sorted(
            {n.rpartition(".")[2] for n, m in model.named_modules() if _linear(m)}
        )
    head = _head(model)
    found = [
        Place(name, module)
        for name, module in model.named_modules()
        if name and peft.targeted(config, name)
        and (not every or (_linear(module) and module is not head))
    ]  # fmt: skip
    odd = [p for p in found if not (_linear(p.base) or isinstance(p.base, nn.Embedding))]
    if odd:
        raise UsageError(
            f"--target-modules: {odd[0].module} is a {type(odd[0].base).__name__}, no linear layer and no "
            "embedding. Name the layers in it."
        )
    if not found:
        known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _linear(m)})
        where = f" in layers {', '.join(map(str, targets.layers))}" if targets.layers else ""
        raise MatchError(
            f"--target-modules: no module{where} is named by {', '.join(targets.modules) or 'all-linear'}. "
            f"{suggestion(targets.modules[0] if targets.modules else '', known)}"
        )
    return found


def _linear(module: nn.Module) -> bool:
    """nn.Linear, Conv1D, or a quantized layer with their sides."""
    return isinstance(module, nn.Linear) or turned(module) or unpacks(module)


def _head(model: nn.Module) -> nn.Module | None:
    """What PEFT leaves out of all-linear: the layer that gives the logits."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        return output  # type: ignore[no-any-return]
    return next((m for n, m in model.named_children() if n in HEADS), None)


@dataclass(frozen=True, slots=True)
class Detours:
    """A model with its adapted layers by path, and the parameters that are trained whole by name."""

    model: nn.Module
    layers: Mapping[str, Adapted]
    whole: Mapping[str, nn.Parameter]

    def named(self) -> list[Named]:
        """Everything that has gradients, each once, in the model's order."""
        found: dict[int, Named] = {}
        for path, layer in self.layers.items():
            for factor, parameter in layer.factors.items():
                if parameter.requires_grad:
                    embedding = layer.layout == "embedding" and factor in "AB"
                    role = "embedding" if embedding else _ROLES.get(factor, "A")
                    found.setdefault(id(parameter), Named(f"{path}.{factor}", role, parameter))
        for name, parameter in self.whole.items():
            found.setdefault(id(parameter), Named(name, "head", parameter))
        return list(found.values())


def attach(
    model: nn.Module,
    found: Sequence[Place],
    config: AdapterConfig,
    factors: Mapping[str, Factors],
    dropout: float = 0.0,
) -> dict[str, Adapted]:
    """Freeze the model and put each place's factors beside it, where it has any; none is trained yet."""
    model.requires_grad_(requires_grad=False)
    layers = {}
    for place in (p for p in found if p.module in factors):
        layer = wrap(place.base, config, factors[place.module], dropout)
        layer.train(model.training)
        parent, _, child = place.module.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layers[place.module] = layer
    return layers


def whole(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters of modules that are trained whole. Raises MatchError for a name that is none's."""
    found: dict[str, nn.Parameter] = {}
    for wanted in names:
        mine = {
            name: p
            for name, p in model.named_parameters()
            if peft.saved({"modules_to_save": [wanted]}, name.rpartition(".")[0])
        }
        if not mine:
            known = [name for name, _ in model.named_modules() if name]
            raise MatchError(
                f"--modules-to-save {wanted}: the model has no such module. {suggestion(wanted, known)}"
            )
        found |= mine
    return found


def detours(
    model: nn.Module, layers: Mapping[str, Adapted], trained: Sequence[str], save: Sequence[str]
) -> Detours:
    """Let the method's factors and the whole modules have gradients."""
    for layer in layers.values():
        for name in (name for name in trained if name in layer.factors):
            layer.factors[name].requires_grad_()
    kept = whole(model, save)
    for parameter in kept.values():
        parameter.requires_grad_()
    return Detours(model, layers, kept)
