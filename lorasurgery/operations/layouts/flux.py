"""Flux's modules as Black Forest Labs and kohya name and fuse them, in diffusers' names and split as there.

`double_blocks_0_img_attn_qkv` is q, k and v row on row, a third each; `single_blocks_0_linear1` is q, k, v and
what leads into the MLP, which is four times as wide. The last modulation has shift before scale, and diffusers
the other way round. Names and rows are those of diffusers' own reader of such files
(loaders/lora_conversion_utils.py 019c496), which was read and not run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from lorasurgery.adapter import Adapter, Site
from lorasurgery.arrays import Array
from lorasurgery.errors import MatchError
from lorasurgery.operations.layouts.fused_rows import Rows
from lorasurgery.operations.layouts.projections_split import check_rows, of_rows
from lorasurgery.operations.layouts.relaid import Relaid

_BLOCK = re.compile(r"unet\.(?P<kind>double|single)_blocks_(?P<n>\d+)_(?P<rest>.+)")
_CLIP = re.compile(r"text_model_encoder_layers_(?P<n>\d+)_(?P<block>self_attn|mlp)_(?P<rest>\w+)")
# the rest of the name -> the modules that it is, and how wide each is
_DOUBLE = {
    "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn_proj": ("attn.to_add_out",), "img_mlp_0": ("ff.net.0.proj",), "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",), "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",), "txt_mod_lin": ("norm1_context.linear",),
}  # fmt: skip
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}  # fmt: skip
_EMBEDDERS = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
_WHOLE = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer_linear": "proj_out",
    **{
        f"{ours}_{side}_layer": f"time_text_embed.{theirs}_embedder.linear_{n}"
        for ours, theirs in _EMBEDDERS.items() for n, side in ((1, "in"), (2, "out"))
    },
}  # fmt: skip
_SWAPPED = {"final_layer_adaLN_modulation_1": "norm_out.linear"}


def is_flux(adapter: Adapter) -> bool:
    """Whether its modules are named as Flux's own code names them."""
    return any(_BLOCK.fullmatch(site.module) for site in adapter.sites)


def as_diffusers(adapter: Adapter) -> Relaid:
    """Exact. Raises MatchError for a module that has no name there, and for rows that are not as they should be."""
    found = [(new, site) for site in adapter.sites for new in _renamed(adapter, site)]
    made = replace(adapter, sites=tuple(new for new, _ in found), dialect="peft", settings={})
    note = (
        f"{len(adapter.sites)} modules of Flux are written as the {len(found)} that diffusers has"
    )
    return Relaid(made, tuple(old for _, old in found), (note,))


def _renamed(adapter: Adapter, site: Site) -> Iterator[Site]:
    part, _, path = site.module.partition(".")
    match, clip = _BLOCK.fullmatch(site.module), _CLIP.fullmatch(path)
    if part == "text_encoder" and clip:
        module = (
            f"text_encoder.text_model.encoder.layers.{clip['n']}.{clip['block']}.{clip['rest']}"
        )
        yield replace(site, module=module)
    elif part == "unet" and path in _WHOLE:
        yield replace(site, module=f"transformer.{_WHOLE[path]}")
    elif part == "unet" and path in _SWAPPED:
        check_rows(adapter, site)
        yield of_rows(site, f"transformer.{_SWAPPED[path]}", _swapped(site))
    elif match and match["rest"] in (names := _SINGLE if match["kind"] == "single" else _DOUBLE):
        single = "single_" if match["kind"] == "single" else ""
        owner = f"transformer.{single}transformer_blocks.{match['n']}"
        yield from _split(adapter, site, owner, names[match["rest"]])
    else:
        raise MatchError(
            f"{adapter.path}: {site.module} is none of Flux's modules that diffusers has a name for. Leave it "
            "out."
        )


def _split(adapter: Adapter, site: Site, owner: str, names: tuple[str, ...]) -> Iterator[Site]:
    if len(names) == 1:
        yield replace(site, module=f"{owner}.{names[0]}")
        return
    check_rows(adapter, site)
    widths = [4 if name == "proj_mlp" else 1 for name in names]
    out = site.size[0] or 0
    if out % sum(widths):
        raise MatchError(
            f"{adapter.path}: {site.module} has {out} rows, which are not {sum(widths)} times the width of "
            f"{', '.join(names)}. Leave it out."
        )
    lie = Rows(1, tuple(width * (out // sum(widths)) for width in widths))
    for i, name in enumerate(names):
        yield of_rows(site, f"{owner}.{name}", lie.of(i))


def _swapped(site: Site) -> Array:
    """Scale's rows, which come second, and then shift's."""
    out = site.size[0] or 0
    return np.roll(np.arange(out), -(out // 2))
