"""kohya's files of SDXL, named as Stability's code, and of Flux, named and fused as Black Forest Labs'.

The pairs of names are those that diffusers' reader of such files makes (loaders/lora_conversion_utils.py), and
that sd-scripts' conversion of SDXL's U-Net makes (library/sdxl_model_util.py); neither is run here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from algebra import cli
from handmade import adapter, delta, lora, numbers
from safetensors.numpy import load_file, save_file

from lorasurgery.adapter import Adapter, AdapterConfig
from lorasurgery.dialects import diffusers, kohya
from lorasurgery.errors import MatchError
from lorasurgery.operations.lint import lint
from lorasurgery.operations.runtimes.fit import fit
from lorasurgery.unet_names import diffusers_name

PAIRS = {
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_2_0_out_layers_3": "down_blocks_0_resnets_1_conv2",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_4_0_emb_layers_1": "down_blocks_1_resnets_0_time_emb_proj",
    "input_blocks_4_1_proj_in": "down_blocks_1_attentions_0_proj_in",
    "input_blocks_5_1_transformer_blocks_1_attn2_to_out_0":
        "down_blocks_1_attentions_1_transformer_blocks_1_attn2_to_out_0",
    "input_blocks_6_0_op": "down_blocks_1_downsamplers_0_conv",
    "input_blocks_8_1_transformer_blocks_9_ff_net_0_proj":
        "down_blocks_2_attentions_1_transformer_blocks_9_ff_net_0_proj",
    "middle_block_0_in_layers_2": "mid_block_resnets_0_conv1",
    "middle_block_1_transformer_blocks_3_attn1_to_q":
        "mid_block_attentions_0_transformer_blocks_3_attn1_to_q",
    "middle_block_2_emb_layers_1": "mid_block_resnets_1_time_emb_proj",
    "output_blocks_0_1_proj_out": "up_blocks_0_attentions_0_proj_out",
    "output_blocks_2_1_transformer_blocks_0_attn1_to_k":
        "up_blocks_0_attentions_2_transformer_blocks_0_attn1_to_k",
    "output_blocks_2_2_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_3_0_skip_connection": "up_blocks_1_resnets_0_conv_shortcut",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_8_0_in_layers_2": "up_blocks_2_resnets_2_conv1",
    # Stable Diffusion 1 has no attention in its lowest level
    "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
    # diffusers' own stay
    "down_blocks_1_attentions_0_proj_in": "down_blocks_1_attentions_0_proj_in",
    "mid_block_resnets_0_conv1": "mid_block_resnets_0_conv1",
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_stabilitys_names_are_diffusers_by_a_rule(name):
    assert diffusers_name(f"{name}.weight") == f"{PAIRS[name]}.weight"


STABILITY = (
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
    "middle_block_1_proj_in",
    "output_blocks_5_1_proj_out",
)
DIFFUSERS = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in",
    "up_blocks.1.attentions.2.proj_out",
)  # fmt: skip


def sdxl(tmp_path: Path) -> tuple[Path, Path]:
    """A part of a U-Net in diffusers' names, and an adapter of it in Stability's."""
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    held = {f"{name}.weight": numbers((6, 8), i) for i, name in enumerate(DIFFUSERS)}
    save_file(held, unet / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    made = adapter([lora(f"unet.{name}", 6, 8) for name in STABILITY])
    kohya.write(made, tmp_path)
    return unet, tmp_path / "lora.safetensors"


def test_an_adapter_in_stabilitys_names_is_merged_into_a_unet_in_diffusers(tmp_path):
    unet, source = sdxl(tmp_path)
    code, _, stderr = cli("merge", unet, source, "-o", tmp_path / "out")
    assert code == 0, stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(unet / "diffusion_pytorch_model.safetensors")
    for site, name in zip(kohya.read(source).sites, sorted(STABILITY), strict=True):
        assert site.module == f"unet.{name}"
        key = f"{DIFFUSERS[STABILITY.index(name)]}.weight"
        np.testing.assert_array_equal(merged[key], before[key] + delta(site).astype(np.float32))


def test_it_is_written_for_diffusers_by_those_names(tmp_path):
    unet, source = sdxl(tmp_path)
    out = tmp_path / "out"
    code, _, stderr = cli("convert", source, "-o", out, "--for", "diffusers", "--base", unet)
    assert code == 0, stderr
    assert {s.module for s in diffusers.read(out).sites} == {f"unet.{name}" for name in DIFFUSERS}


WIDTH, IN = 4, 6


def flux() -> Adapter:
    """One of each kind of module."""
    rows = {
        "double_blocks_0_img_attn_qkv": 3 * WIDTH, "double_blocks_11_txt_attn_qkv": 3 * WIDTH,
        "double_blocks_0_txt_mod_lin": 6 * WIDTH, "double_blocks_0_img_attn_proj": WIDTH,
        "double_blocks_0_txt_mlp_2": WIDTH, "single_blocks_37_linear1": 7 * WIDTH,
        "single_blocks_37_linear2": WIDTH, "single_blocks_0_modulation_lin": 3 * WIDTH,
        "final_layer_adaLN_modulation_1": 2 * WIDTH, "final_layer_linear": 5, "img_in": WIDTH,
        "guidance_in_out_layer": WIDTH,
    }  # fmt: skip
    clip = lora("text_encoder.text_model_encoder_layers_3_self_attn_q_proj", WIDTH, IN)
    return adapter(
        [*(lora(f"unet.{n}", out, IN) for n, out in rows.items()), clip], dialect="kohya"
    )


# which rows of which module each of diffusers' is
WANTED = {
    **{
        f"transformer.transformer_blocks.0.attn.to_{x}": ("double_blocks_0_img_attn_qkv", i * WIDTH, WIDTH)
        for i, x in enumerate("qkv")
    },
    **{
        f"transformer.transformer_blocks.11.attn.add_{x}_proj": ("double_blocks_11_txt_attn_qkv", i * WIDTH, WIDTH)
        for i, x in enumerate("qkv")
    },
    **{
        f"transformer.single_transformer_blocks.37.{x}": ("single_blocks_37_linear1", i * WIDTH, size * WIDTH)
        for i, (x, size) in enumerate((("attn.to_q", 1), ("attn.to_k", 1), ("attn.to_v", 1), ("proj_mlp", 4)))
    },
    "transformer.transformer_blocks.0.norm1_context.linear": ("double_blocks_0_txt_mod_lin", 0, 6 * WIDTH),
    "transformer.transformer_blocks.0.attn.to_out.0": ("double_blocks_0_img_attn_proj", 0, WIDTH),
    "transformer.transformer_blocks.0.ff_context.net.2": ("double_blocks_0_txt_mlp_2", 0, WIDTH),
    "transformer.single_transformer_blocks.37.proj_out": ("single_blocks_37_linear2", 0, WIDTH),
    "transformer.single_transformer_blocks.0.norm.linear": ("single_blocks_0_modulation_lin", 0, 3 * WIDTH),
    "transformer.proj_out": ("final_layer_linear", 0, 5),
    "transformer.x_embedder": ("img_in", 0, WIDTH),
    "transformer.time_text_embed.guidance_embedder.linear_2": ("guidance_in_out_layer", 0, WIDTH),
}  # fmt: skip


def test_flux_is_split_and_named_as_diffusers_has_it(tmp_path):
    made = flux()
    kohya.write(made, tmp_path)
    out = tmp_path / "out"
    code, _, stderr = cli("convert", tmp_path / "lora.safetensors", "-o", out, "--for", "diffusers")
    assert code == 0, stderr
    before = {site.module.removeprefix("unet."): delta(site) for site in made.sites}
    found = {site.module: delta(site) for site in diffusers.read(out).sites}
    # the scale is rounded into B
    near = {"rtol": 1e-6, "atol": 4e-6}
    for name, (of, first, size) in WANTED.items():
        np.testing.assert_allclose(found.pop(name), before[of][first : first + size], **near)
    # shift before scale becomes scale before shift
    swapped = before["final_layer_adaLN_modulation_1"]
    wanted = np.concatenate([swapped[WIDTH:], swapped[:WIDTH]])
    np.testing.assert_allclose(found.pop("transformer.norm_out.linear"), wanted, **near)
    clip = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj"
    assert found.keys() == {clip}
    assert not lint(out, "diffusers").rows
    assert fit(made, "diffusers").notes == (
        "13 modules of Flux are written as the 20 that diffusers has",
        "the scale of 20 modules is baked into B; alpha is the rank",
    )


def refused(made: Adapter) -> str:
    with pytest.raises(MatchError) as error:
        fit(made, "diffusers")
    return str(error.value).removeprefix("made/by-hand: ")


def test_what_of_flux_has_no_place_in_diffusers_is_refused():
    one = lora("unet.double_blocks_0_img_attn_qkv", 3 * WIDTH, IN)
    made = adapter([one, lora("unet.double_blocks_0_img_attn_norm", 4, IN)], dialect="kohya")
    assert refused(made) == (
        "unet.double_blocks_0_img_attn_norm is none of Flux's modules that diffusers has a name for. Leave it out."
    )
    assert refused(adapter([lora(one.module, 3 * WIDTH + 1, IN)], dialect="kohya")) == (
        "unet.double_blocks_0_img_attn_qkv has 13 rows, which are not 3 times the width of attn.to_q, attn.to_k, "
        "attn.to_v. Leave it out."
    )
    loha = replace(one, config=AdapterConfig("loha", 2, 3.0))
    assert refused(adapter([loha], dialect="kohya")) == (
        "unet.double_blocks_0_img_attn_qkv is a loha, whose change does not fall apart by rows. Convert it "
        "first: lorasurgery convert --to lora."
    )
