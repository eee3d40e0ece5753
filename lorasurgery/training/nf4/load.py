"""transformers' model of a base with NF4 in the place of its linear weights; none of them is ever whole in memory.

transformers builds the model without data and reads all that is not packed; the packed weights are read one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorasurgery.codec import CodecOptions
from lorasurgery.errors import FormatError
from lorasurgery.model import open_model
from lorasurgery.naming import Names
from lorasurgery.training.adapted import sides, turned
from lorasurgery.training.nf4.linear import NF4Linear
from lorasurgery.training.nf4.stored import PackedWeights

_METHOD = "lorasurgery_nf4"


def load(
    path: Path,
    dtype: torch.dtype,
    options: CodecOptions,
    kind: Any = AutoModelForCausalLM,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The model, of some class and with facts for its config; what is not NF4 is in `dtype`.

    Raises what transformers raises for a directory that it cannot load; FormatError and MatchError.
    """
    weights = PackedWeights(open_model(path), options)
    config = AutoConfig.from_pretrained(path, **facts)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = kind.from_pretrained(
        path, config=config, dtype=dtype, quantization_config=_Weights(weights)
    )
    # nothing is left that transformers would have to know of
    model.hf_quantizer.remove_quantization_config(model)
    return model


@register_quantization_config(_METHOD)
class _Weights(QuantizationConfigMixin):
    """How transformers' loader is handed the packed weights."""

    def __init__(self, weights: PackedWeights) -> None:
        self.quant_method: Any = _METHOD
        self.weights = weights

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _Loader(HfQuantizer):
    """Takes linear layers out before weights are read, and fills those that stand for them after."""

    def __init__(self, quantization_config: _Weights, **facts: Any) -> None:
        super().__init__(quantization_config, **facts)
        self._weights = quantization_config.weights
        self._layers: dict[str, NF4Linear] = {}  # by their weight's name in the file

    def is_serializable(self) -> bool:
        """An adapter is what is written."""
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        linear = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.Linear or turned(module)
        ]
        names = Names(self._weights.model.weights, [f"{name}.weight" for name in linear])
        for name in linear:
            found = names.find(f"{name}.weight")
            if found in self._weights.names:
                self._layers[found] = _replace(model, name)
        self._check(model)

    def _check(self, model: nn.Module) -> None:
        """Raises FormatError for a packed weight that no layer takes: it would be made up anew."""
        left = sorted(self._weights.names - self._layers.keys())
        if left and self._weights.ready:
            raise FormatError(
                f"{self._weights.model.path}: {left[0]} is NF4 ({len(left) - 1} more like it), and no linear "
                f"layer of {type(model).__name__} takes it. Dequantize it with `lorasurgery dequantize`."
            )

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, layer in self._layers.items():
            layer.hold(self._weights.read(name))
        return model


def _replace(model: nn.Module, name: str) -> NF4Linear:
    module = model.get_submodule(name)
    out, in_ = sides(module)
    bias: Any = module.bias
    layer = NF4Linear(in_, out, bias)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)
    return layer
