"""A checkpoint's weights as parameters that an adapter can change, seen as [out, in] or [experts, out, in]."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lorasurgery.adapter import AdapterConfig, Site
from lorasurgery.arrays import Array
from lorasurgery.layouts import EMBEDDINGS, TURNED_EXPERTS, is_conv1d
from lorasurgery.model import Model
from lorasurgery.tensors import FLOATS, TensorInfo

_EMBEDDING = re.compile(r".*(?:embeddings?|embed_tokens|wte|wpe)\.weight")
_EXPERTS = re.compile(r".*\bexperts\.[^.]+")


@dataclass(frozen=True, slots=True)
class Layer:
    """One tensor that B A may be added to; `turned`: it is stored [in, out]."""

    info: TensorInfo
    layout: str
    turned: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.info.shape[2:] if self.layout == "linear" else ()

    def seen(self, w: Array) -> Array:
        """The stored tensor as [out, in], or [experts, out, in]."""
        if self.layout != "experts":
            w = w.reshape(w.shape[0], -1)
        return w.swapaxes(-1, -2) if self.turned else w

    @property
    def site(self) -> Site:
        """The parameter without factors yet; the trainer's path is taken to be the stored one."""
        module, _, parameter = self.info.name.rpartition(".")
        config = AdapterConfig("lora", 1, 1.0)
        return Site(
            module, parameter, self.layout, config, {}, dict, self.kernel,
            fan_in_fan_out=self.turned and self.layout == "linear",
        )  # fmt: skip


def layer_of(model: Model, name: str) -> Layer | None:
    """How an adapter would see this tensor of a model; None for norms, biases and what is no float."""
    info = model.weights.info(name)
    if info.dtype not in FLOATS or len(info.shape) < 2 or 0 in info.shape:
        return None
    if len(info.shape) == 3 and _EXPERTS.fullmatch(name):
        turned = str(model.config.get("model_type", "")) in TURNED_EXPERTS
        return Layer(info, "experts", turned)
    if not name.endswith(".weight") or min(info.shape[0], math.prod(info.shape[1:])) < 2:
        return None
    if name.endswith(EMBEDDINGS) or _EMBEDDING.fullmatch(name):
        return Layer(info, "embedding")
    return Layer(info, "linear", is_conv1d(model.config, name) and len(info.shape) == 2)
