"""IA3 as PEFT stores it.

Keys are base_model.model. + module path + .ia3_l [out, 1], of feed-forward modules [1, in], of convolutions
[1, channels, 1, 1] either way. What scales a module's outputs scales its bias too, if it has one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasurgery.adapter import Adapter, AdapterConfig, Site
from lorasurgery.checkpoint import Checkpoint
from lorasurgery.dialects import _peft_form_read as form
from lorasurgery.dialects import _peft_form_write as writing
from lorasurgery.errors import FormatError
from lorasurgery.problems import Problem
from lorasurgery.tensors import TensorInfo

if TYPE_CHECKING:
    from lorasurgery.arrays import Array

VARIANTS = ("ia3",)

_KIND = form.Kind(
    "IA3", {"ia3_l": "l"}, frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})
)


def read(path: Path, config: Mapping[str, Any], source: Checkpoint) -> Adapter:
    """As peft.Form asks."""

    def sites(module: str, keys: form.Keys) -> list[Site] | Problem:
        info, inner = keys["l"], _feedforward(config, module)
        kernel = info.shape[2:]
        across = 1 if inner or kernel else 0  # where the scales lie in the file
        if len(info.shape) < 2 or info.numel != info.shape[across]:
            return Problem(
                info.name, f"{module}: ia3_l {list(info.shape)} scales no "
                f"{'inputs' if inner else 'outputs'}, as feedforward_modules would have it",
            )  # fmt: skip
        size = info.numel
        shape, sides = ((1, size), (None, size)) if inner else ((size, 1), (size, None))
        site = Site(
            module, "weight", "channels" if kernel else "linear",
            AdapterConfig("ia3", 1, 1.0, extra={"feedforward": inner}),
            {"l": TensorInfo(info.name, "F32", shape)},
            lambda: {"l": form.loaded(source, info.name).reshape(shape)},
            kernel, bool(config.get("fan_in_fan_out")), sides,
        )  # fmt: skip
        bias = replace(site, parameter="bias", layout="parameter", kernel=(), optional=True)
        return [site] if inner else [site, bias]

    return form.read(path, config, source, _KIND, sites)


def write(adapter: Adapter, folder: Path) -> None:
    """As peft.Form asks. Raises FormatError for LyCORIS' IA3, which leaves biases as they are."""
    for site in adapter.sites:
        if site.config.extra.get("bias_kept") and not site.config.extra.get("feedforward"):
            raise FormatError(
                f"{adapter.path}: {site.module} is scaled without its bias, and PEFT's IA3 scales both. "
                "Merge it, or write kohya."
            )
    inner = {site.module for site in adapter.sites if site.config.extra.get("feedforward")}
    turned = any(site.fan_in_fan_out for site in adapter.sites)
    fields = {"feedforward_modules": sorted(inner), "fan_in_fan_out": turned}
    writing.write(adapter, folder, _KIND, fields, _stored)


def _stored(site: Site) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Array]]]:
    if site.parameter != "weight":  # the bias has the weight's scales
        return
    info = site.factors["l"]
    shape = (1, info.numel, *(1 for _ in site.kernel)) if site.kernel else info.shape
    _, load = writing.factor(site, info, "l", turned=False)
    yield "ia3_l", shape, load


def _feedforward(config: Mapping[str, Any], module: str) -> bool:
    """Whether the inputs are scaled; PEFT compares the ends of names, dot or no dot."""
    names = config.get("feedforward_modules") or ()
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return module.endswith(tuple(names))
