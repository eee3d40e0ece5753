"""W' = what PEFT's own layer merges: for its types that have no formula here.

extra['settings'] is the adapter_config.json, extra['module'] the path; factors have PEFT's names below the
module, or with a slash in front from the top, for what modules share. extra['widest'] is the size of the
largest module where what they share is as large, extra['biased'] says that the layer has a bias, and
extra['weight'] gives the weight where W is that bias, and extra['shape'] is a convolution's. Needs the extra `peft`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import _peft_drawn as drawn  # noqa: F401 - dialects reach it from here
from lorasurgery.errors import MatchError, UsageError, ValueRangeError

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor

    from lorasurgery.arrays import A

LINEAR_IN_W = False  # of some types it is free of W; of HiRA, HRA or BOFT it is not

_PREFIX = "base_model.model."
_WIDEST = "widest"  # a module whose weight has a size and no memory
# what chooses modules, of which there is one, and what is done to others
_CHOICES = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "fan_in_fan_out", "auto_mapping", "base_model_name_or_path", "bias",
)  # fmt: skip


def shapes(out: int, in_: int, config: AdapterConfig) -> dict[str, tuple[int, ...]]:
    """As PEFT's layer has them."""
    import torch

    return {name: tuple(f.shape) for name, f in _fresh(torch.ones(out, in_), config).items()}


def init(w: Tensor, config: AdapterConfig, rng: Generator) -> dict[str, Tensor]:
    """As PEFT starts them."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        return _fresh(w, config)


def delta(w: A, factors: Mapping[str, A], config: AdapterConfig) -> A:
    """ΔW [out, in]: the merged weight less W."""
    if isinstance(w, np.ndarray):
        import torch

        held = {name: torch.from_numpy(np.array(f)) for name, f in factors.items()}
        return np.asarray(_merged(torch.from_numpy(np.array(w)), held, config).numpy() - w)
    change: A = _merged(w, factors, config) - w
    return change


def forward(x: Tensor, w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    """PEFT's layer itself: x [..., in] -> [..., out]."""
    model = _filled(w, factors, config)
    layer = model.base_model.model.get_submodule(_module(config))
    computed: Tensor = layer(x).detach()
    return computed


def from_lora(w: A, a: A, b: A) -> dict[str, A] | None:  # noqa: ARG001
    """Which type it would be is not said."""
    return None


def from_delta(
    w: A,  # noqa: ARG001
    delta: A,  # noqa: ARG001
    lora: tuple[A, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> dict[str, A] | None:
    """None: which type it would be is not said."""
    return None


def low_rank(
    factors: Mapping[str, A],  # noqa: ARG001
    config: AdapterConfig,  # noqa: ARG001
) -> tuple[A, A] | None:
    """PEFT gives the weight alone."""
    return None


def config_class(kind: str) -> Any:
    """PEFT's config of a type. Raises UsageError without PEFT, MatchError where it has no such type."""
    found = _peft().mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if found is None:
        raise MatchError(f"peft {_peft().__version__} has no type {kind}. Install a newer peft.")
    return found


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError:
        raise UsageError(
            "peft is not installed, whose own layers such adapters need. Run pip install "
            "'lorasurgery[peft]'."
        ) from None


def _module(config: AdapterConfig) -> str:
    return str(config.extra.get("module", "layer"))


def _adapted(w: Tensor, config: AdapterConfig) -> Any:
    """A model of one layer with this weight or bias, at the module's path, and PEFT's adapter on it."""
    import torch

    if config.extra.get("incomplete"):
        raise MatchError(str(config.extra["incomplete"]))
    settings = config.extra.get("settings") or {"peft_type": "HIRA", "r": config.rank}
    assert isinstance(settings, Mapping)
    kind = config_class(str(settings["peft_type"]))
    known = {f.name for f in fields(kind)} - {*_CHOICES, "peft_type", "inference_mode"}
    said = {name: value for name, value in settings.items() if name in known}
    targets = [_module(config)]
    model = torch.nn.Module()
    _put(model, targets[0], _layer(w, config))
    if widest := cast("tuple[int, int] | None", config.extra.get("widest")):
        targets.append(_WIDEST)
        _put(model, _WIDEST, _linear(torch.zeros(()).expand(widest)))
    return _peft().get_peft_model(model, kind(target_modules=targets, **said))


def _put(model: torch.nn.Module, path: str, layer: torch.nn.Module) -> None:
    import torch

    *owners, last = path.split(".")
    for name in owners:
        model.add_module(name, torch.nn.Module())
        model = model.get_submodule(name)
    model.add_module(last, layer)


def _layer(w: Tensor, config: AdapterConfig) -> torch.nn.Module:
    import torch

    if config.extra.get("embedding"):
        return torch.nn.Embedding(w.shape[0], w.shape[1], _weight=w.detach().clone())
    if shape := cast("tuple[int, ...]", config.extra.get("shape", ())):
        kind = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(shape) - 3]
        convolution = kind(shape[1], shape[0], shape[2:], bias=False)  # type: ignore[arg-type]
        convolution.weight.data = w.detach().clone().reshape(shape)
        return convolution
    if not config.extra.get("bias"):
        bias = torch.zeros(len(w)) if config.extra.get("biased") else None
        return _linear(w.detach().clone(), bias)
    # of most types a bias is changed whatever the weight is
    given = cast("Callable[[], Tensor] | None", config.extra.get("weight"))
    return _linear(given() if given else torch.zeros(len(w), 1), w.detach().clone().reshape(-1))


def _linear(weight: Tensor, bias: Tensor | None = None) -> torch.nn.Linear:
    import torch

    layer = torch.nn.Linear(1, 1, bias=bias is not None)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    return layer


def _fresh(w: Tensor, config: AdapterConfig) -> dict[str, Tensor]:
    state = _peft().get_peft_model_state_dict(_adapted(w, config))
    own = f"{_PREFIX}{_module(config)}."
    return {
        key.removeprefix(own) if key.startswith(own) else f"/{key}": t.detach().clone()
        for key, t in state.items()
    }


def _filled(w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Any:
    """Raises MatchError for a factor that PEFT's layer has not, or has and was not given, ValueRangeError for nan."""
    if not w.isfinite().all():  # the SVD in TinyLoRA's start would fail with an error of its own
        raise ValueRangeError(
            f"{_module(config)}: its base weight holds nan or inf. Look for it in the base, and in the "
            "adapter if that keeps a copy."
        )
    for name, factor in factors.items():
        if not factor.isfinite().all():
            raise ValueRangeError(
                f"{_module(config)}: {name.lstrip('/')} holds nan or inf. Look for it in the adapter."
            )
    model = _adapted(w, config)
    own = f"{_PREFIX}{_module(config)}."
    state = _peft().get_peft_model_state_dict(model)
    wanted = {(k, t.shape) for k, t in state.items() if not k.startswith(f"{_PREFIX}{_WIDEST}.")}
    # of what others share a layer takes its own part
    given = {
        n[1:] if n[0] == "/" else own + n: f for n, f in factors.items() if n[0] != "/" or n[1:] in state
    }  # fmt: skip
    found = {(key, t.shape) for key, t in given.items()}
    if wanted != found:
        odd = sorted({f"{key} {list(shape)}" for key, shape in wanted ^ found})
        raise MatchError(
            f"{_module(config)}: peft {_peft().__version__} and the adapter's file do not agree on "
            f"{', '.join(odd[:3])}. Merge it with the peft that wrote it."
        )
    _peft().set_peft_model_state_dict(model, given)
    layer = model.base_model.model.get_submodule(_module(config))
    if hasattr(layer, "frod_U"):  # made of W and of V as it was before it was given
        v = layer.frod_V["default"]
        layer.frod_U["default"] = layer._calculate_frod_u_and_lambda(v, w)[0]  # noqa: SLF001
    return model.eval()


def _merged(w: Tensor, factors: Mapping[str, Tensor], config: AdapterConfig) -> Tensor:
    layer = _filled(w, factors, config).base_model.model.get_submodule(_module(config))
    layer.merge()
    base = layer.get_base_layer()
    found: Tensor = (base.bias if config.extra.get("bias") else base.weight).detach()
    return found.reshape(w.shape)
