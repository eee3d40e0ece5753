"""A U-Net's modules as Stability's code names them, which kohya's SDXL files keep, in diffusers' names.

`input_blocks_4_1_proj_in` is `down_blocks_1_attentions_0_proj_in`: every third input block ends a level with its
downsampler, every third output block with its upsampler, and within a block 0 is the resnet, 1 the attention. So
it is with two layers a level, as in Stable Diffusion 1, 2 and XL. The rules were compared with those of diffusers
(loaders/lora_conversion_utils.py 019c496), which was read and not run.
"""

from __future__ import annotations

import re

_BLOCK = re.compile(r"(?P<where>input|output)_blocks_(?P<n>\d+)_(?P<inner>[0-2])_(?P<rest>.+)")
_MIDDLE = re.compile(r"middle_block_(?P<inner>[0-2])_(?P<rest>.+)")
# within a resnet
_RESNET = {
    "in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}  # fmt: skip
_WHOLE = {
    "input_blocks_0_0": "conv_in", "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2",
}  # fmt: skip
_LEVEL = 3  # blocks


def diffusers_name(parameter: str) -> str:
    """The same parameter (`joined_path.weight`) in diffusers' names, still joined; any other as it is."""
    path, dot, last = parameter.rpartition(".")
    return f"{_module(path)}{dot}{last}"


def _module(path: str) -> str:
    if match := _MIDDLE.fullmatch(path):
        which = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}[match["inner"]]
        return f"mid_block_{which}_{_inside(match['rest'], resnet=match['inner'] != '1')}"
    match = _BLOCK.fullmatch(path)
    if match is None or path in _WHOLE:
        return _WHOLE.get(path, path)
    down = match["where"] == "input"
    # the first input block is the convolution that leads in
    level, layer = divmod(int(match["n"]) - down, _LEVEL)
    at = f"{'down' if down else 'up'}_blocks_{level}"
    if match["rest"] == ("op" if down else "conv"):
        return f"{at}_{'downsamplers' if down else 'upsamplers'}_0_conv"
    resnet = match["inner"] == "0"
    kind = "resnets" if resnet else "attentions"
    return f"{at}_{kind}_{layer}_{_inside(match['rest'], resnet=resnet)}"


def _inside(rest: str, *, resnet: bool) -> str:
    return _RESNET.get(rest, rest) if resnet else rest
