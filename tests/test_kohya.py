"""kohya's and LyCORIS' file: names without dots, alphas, convolutions, cores, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from handmade import adapter, delta, lora, numbers, site
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lorasurgery.adapter import AdapterConfig
from lorasurgery.adapters import dora
from lorasurgery.cli.app import app
from lorasurgery.dialects import kohya, peft
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.naming import Names
from lorasurgery.problems import refuse
from lorasurgery.tensors import TensorInfo

AT = "lora_unet_mid_block_to_q"


def saved(path: Path, tensors: dict[str, object], **metadata: str) -> Path:
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, path, metadata=metadata or None)
    return path


def pair(name: str = AT, **others: object) -> dict[str, object]:
    ends = {"lora_down.weight": numbers((3, 8)), "lora_up.weight": numbers((6, 3), 1)}
    return {f"{name}.{end}": t for end, t in {**ends, **others}.items()}


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [(np.float32(6), 2.0), (np.array([1.5], np.float16), 0.5), (None, 1.0), (np.float32(0), 1.0)],
)
def test_a_missing_alpha_and_an_alpha_of_0_are_the_rank(tmp_path, alpha, scale):
    alphas = {} if alpha is None else {"alpha": np.asarray(alpha)}
    (found,) = kohya.read(saved(tmp_path / "x.safetensors", pair(**alphas))).sites
    assert found.module == "unet.mid_block_to_q"
    np.testing.assert_allclose(delta(found), scale * numbers((6, 3), 1) @ numbers((3, 8)))


def test_a_convolution_is_seen_flat_and_written_as_it_was(tmp_path):
    tensors = {
        f"{AT}.lora_down.weight": numbers((3, 8, 3, 3)), f"{AT}.lora_up.weight": numbers((6, 3, 1, 1), 1),
        f"{AT}.alpha": np.float32(3).reshape(()),
    }  # fmt: skip
    found = kohya.read(saved(tmp_path / "x.safetensors", tensors))
    assert found.sites[0].kernel == (3, 3)
    assert found.sites[0].size == (6, 72)
    kohya.write(found, tmp_path)
    again = load_file(tmp_path / "lora.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, key)


def test_a_core_is_folded_into_a(tmp_path):
    down, mid, up = numbers((3, 8, 1, 1)), numbers((3, 3, 3, 3), 1), numbers((6, 3, 1, 1), 2)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
    (found,) = kohya.read(
        saved(tmp_path / "x.safetensors", {f"{AT}.{k}": t for k, t in tensors.items()})
    ).sites
    wanted = np.einsum("opxy,pqhw,qixy->oihw", up, mid, down).reshape(6, 72)
    np.testing.assert_allclose(delta(found), wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 1), (1, 8)])
def test_the_axis_of_a_dora_is_told_by_its_shape(tmp_path, shape):
    tensors = pair(dora_scale=numbers(shape, 4) + 3)
    found = kohya.read(saved(tmp_path / "x.safetensors", tensors))
    (one,) = found.sites
    assert one.config.variant == "dora"
    w = numbers((6, 8), 7)
    v = w + numbers((6, 3), 1) @ numbers((3, 8))
    axis = 1 if shape[1] == 1 else 0
    wanted = tensors[f"{AT}.dora_scale"] * v / np.linalg.norm(v, axis=axis, keepdims=True)
    np.testing.assert_allclose(w + dora.delta(w, one.load(), one.config), wanted, rtol=1e-5)
    kohya.write(found, tmp_path)
    np.testing.assert_array_equal(
        load_file(tmp_path / "lora.safetensors")[f"{AT}.dora_scale"], tensors[f"{AT}.dora_scale"]
    )


def test_the_parts_of_a_pipeline_keep_their_prefixes_and_the_file_its_metadata(tmp_path):
    names = [
        "lora_te1_text_model_q", "lora_te2_text_model_q", "lora_te3_q_1", "lora_transformer_blocks_0_q",
        "lora_unet_q_1", "lycoris_blocks_0_q",
    ]  # fmt: skip
    tensors = {k: t for name in names for k, t in pair(name).items()}
    found = kohya.read(
        saved(tmp_path / "x.safetensors", tensors, ss_sd_model_name="sd", ss_tag="cat")
    )
    assert [s.module for s in found.sites] == [
        "text_encoder.text_model_q", "text_encoder_2.text_model_q", "text_encoder_3.q_1",
        "transformer.blocks_0_q", "unet.q_1", "blocks_0_q",
    ]  # fmt: skip
    assert found.base == "sd"
    kohya.write(found, tmp_path)
    with safe_open(tmp_path / "lora.safetensors", "np") as file:
        assert sorted({k.partition(".")[0] for k in file.keys()}) == sorted(names)  # noqa: SIM118
        assert file.metadata() == {"format": "pt", "ss_sd_model_name": "sd", "ss_tag": "cat"}


@pytest.mark.parametrize("name", ["lora_te_q_1", "lora_te1_q_1"])
def test_a_lone_text_encoder_keeps_the_name_that_it_had(tmp_path, name):
    kohya.write(kohya.read(saved(tmp_path / "x.safetensors", pair(name))), tmp_path)
    assert f"{name}.alpha" in load_file(tmp_path / "lora.safetensors")


def test_joined_names_find_the_tensors_of_a_model():
    stored = [
        "down_blocks.0.to_q.weight",
        "down_blocks.0.proj_in.weight",
        "a.b_c.weight",
        "a_b.c.weight",
    ]
    names = Names(stored, ["unet.down_blocks_0_to_q.weight", "unet.down_blocks_0_proj_in.weight"])
    assert names.find("unet.down_blocks_0_to_q.weight") == "down_blocks.0.to_q.weight"
    assert names.find("unet.down_blocks_0_proj_in.weight") == "down_blocks.0.proj_in.weight"
    assert names.find("unet.down_blocks_1_to_q.weight") is None
    # two paths read so: neither is taken
    assert names.find("a_b_c.weight") is None
    # with dots in it, a path means what it says
    assert Names(["x.y.z.w.weight"], []).find("x.y_z.w.weight") is None


def test_a_file_of_lycoris_names_merges_like_the_same_factors_of_peft(tmp_path):
    base = small.base(tmp_path / "base")
    source = small.adapter(tmp_path / "peft")
    (tmp_path / "kohya").mkdir()
    kohya.write(peft.read(source), tmp_path / "kohya")
    for name in ("peft", "kohya"):
        done = CliRunner().invoke(
            app,
            ["merge", str(base), str(tmp_path / name), "-o", str(tmp_path / f"by-{name}"), "-q"],
        )
        assert done.exit_code == 0, done.output
    one, two = (tmp_path / f"by-{name}" / "model.safetensors" for name in ("peft", "kohya"))
    assert one.read_bytes() == two.read_bytes()


def test_sites_of_a_part_that_the_base_lacks_are_problems(tmp_path):
    base = small.base(tmp_path / "base")
    name = "lora_unet_model_layers_0_mlp_up_proj"
    tensors = {
        f"{name}.lora_down.weight": numbers((3, small.HIDDEN)),
        f"{name}.lora_up.weight": numbers((small.WIDE, 3), 1), **pair("lora_te_text_model_fc1"),
    }  # fmt: skip
    file = saved(tmp_path / "x.safetensors", tensors)
    done = CliRunner().invoke(app, ["merge", str(base), str(file), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "text_encoder.text_model_fc1.weight is adapted, but" in done.stderr
    more = ["--allow-unmatched", "lora_te_*", "-q"]
    done = CliRunner().invoke(
        app, ["merge", str(base), str(file), "-o", str(tmp_path / "out"), *more]
    )
    assert done.exit_code == 0, done.output


PROBLEMS = {
    "a strange prefix": (
        {"other_q.lora_down.weight": numbers((3, 8))},
        "other_q.lora_down.weight begins with none of lora_unet_, lora_te1_, lora_te2_, lora_te3_, lora_te_, "
        "lora_transformer_, lycoris_",
    ),
    "a strange end": ({f"{AT}.gain": numbers((6, 8))}, f"{AT}.gain F32 [6, 8] is no factor that is known"),
    "half a glora": (
        {f"{AT}.a1.weight": numbers((8, 3)), f"{AT}.a2.weight": numbers((3, 8))},
        f"{AT}.a1.weight stands alone: b1.weight of unet.mid_block_to_q is missing",
    ),
    "a glora of two ranks": (
        {
            f"{AT}.a1.weight": numbers((8, 3)), f"{AT}.a2.weight": numbers((3, 8)),
            f"{AT}.b1.weight": numbers((6, 2)), f"{AT}.b2.weight": numbers((3, 8)),
        },
        "unet.mid_block_to_q: a1.weight [8, 3], a2.weight [3, 8], b1.weight [6, 2], b2.weight [3, 8] are no "
        "factors of one glora",
    ),
    "blocks that are not square": (
        {f"{AT}.oft_blocks": numbers((2, 3, 4))},
        "unet.mid_block_to_q: oft_blocks [2, 3, 4] are no factors of one diag_oft",
    ),
    "scales without a side": (
        {f"{AT}.weight": numbers((6,))}, f"{AT}.weight stands alone: on_input of unet.mid_block_to_q is missing",
    ),
    "magnitudes of neither axis of a loha": (
        {
            f"{AT}.hada_w1_a": numbers((6, 3)), f"{AT}.hada_w1_b": numbers((3, 8)),
            f"{AT}.hada_w2_a": numbers((6, 3)), f"{AT}.hada_w2_b": numbers((3, 8)),
            f"{AT}.dora_scale": numbers((5, 1)),
        },
        "unet.mid_block_to_q: magnitudes [5, 1] are neither of the rows nor of the columns of [6, 8]",
    ),
    "a factor alone": (
        {f"{AT}.lora_up.weight": numbers((6, 3))},
        f"{AT}.lora_up.weight stands alone: A (down) of unet.mid_block_to_q is missing",
    ),
    "an alpha alone": (
        {f"{AT}.alpha": numbers(())}, f"{AT}.alpha stands alone: {AT} has no factors",
    ),
    "ranks that differ": (
        {f"{AT}.lora_down.weight": numbers((3, 8)), f"{AT}.lora_up.weight": numbers((6, 2))},
        "unet.mid_block_to_q: A [3, 8], B [6, 2] are no factors of rank 3",
    ),
    "rank 0": (
        {f"{AT}.lora_down.weight": numbers((0, 8)), f"{AT}.lora_up.weight": numbers((6, 0))},
        "unet.mid_block_to_q: A [0, 8], B [6, 0] are no factors of rank 0",
    ),
    "a convolution's B with a kernel": (
        {f"{AT}.lora_down.weight": numbers((3, 8, 1, 1)), f"{AT}.lora_up.weight": numbers((6, 3, 3, 3))},
        "unet.mid_block_to_q: A [3, 8, 1, 1], B [6, 3, 3, 3] are no factors of rank 3",
    ),
    "magnitudes of neither axis": (
        pair(dora_scale=numbers((5, 1))),
        "unet.mid_block_to_q: magnitudes [5, 1] are neither of the rows nor of the columns of [6, 8]",
    ),
    "half a loha": (
        {f"{AT}.hada_w1_a": numbers((6, 3)), f"{AT}.hada_w1_b": numbers((3, 8))},
        f"{AT}.hada_w1_a stands alone: hada_w2_a of unet.mid_block_to_q is missing",
    ),
    "a loha of two ranks": (
        {
            f"{AT}.hada_w1_a": numbers((6, 3)), f"{AT}.hada_w1_b": numbers((3, 8)),
            f"{AT}.hada_w2_a": numbers((6, 2)), f"{AT}.hada_w2_b": numbers((2, 8)),
        },
        "unet.mid_block_to_q: hada_w1_a [6, 3], hada_w1_b [3, 8], hada_w2_a [6, 2], hada_w2_b [2, 8] are "
        "no factors of one loha",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_not_understood_is_a_problem_by_its_name(tmp_path, case):
    tensors, message = PROBLEMS[case]
    found = kohya.read(saved(tmp_path / "x.safetensors", {**tensors, **pair("lora_unet_other_1")}))
    assert [p.message for p in found.problems] == [message]
    assert [s.module for s in found.sites] == ["unet.other_1"]


HADA = {"hada_w1_a": (6, 3), "hada_w1_b": (3, 8), "hada_w2_a": (6, 3), "hada_w2_b": (3, 8)}


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (
            {**HADA, "lora_mid.weight": (3, 3)},
            f"{AT}.lora_mid.weight: stands beside factors of a loha, and nobody here knows what the two mean "
            "together. Merge it with LyCORIS.",
        ),
        (
            {"diff": (6, 8), "dora_scale": (6, 1)},
            f"{AT}.dora_scale: stands beside {AT}.diff, and nobody here knows what the two mean together. "
            "Merge it with LyCORIS.",
        ),
        (
            {"oft_blocks": (2, 3, 2, 2)},
            f"{AT}.oft_blocks: [2, 3, 2, 2] is a BOFT of LyCORIS, whose blocks are mixed in between. Merge it "
            "with LyCORIS.",
        ),
    ],
    ids=["a loha", "a difference", "a BOFT"],
)
def test_what_nobody_knows_together_is_refused(tmp_path, ends, message):
    file = saved(tmp_path / "x.safetensors", {f"{AT}.{e}": numbers(s) for e, s in ends.items()})
    with pytest.raises(MatchError) as error:
        kohya.read(file)
    assert str(error.value) == message


def test_differences_of_weights_biases_and_norms_are_merged_and_written_as_they_were(tmp_path):
    base = small.base(tmp_path / "base", torch.float32)
    q, norm = "model.layers.0.self_attn.q_proj", "model.layers.1.input_layernorm"
    added = {
        f"{q}.weight": numbers((small.HIDDEN, small.HIDDEN)), f"{q}.bias": numbers((small.HIDDEN,), 1),
        f"{norm}.weight": numbers((small.HIDDEN,), 2),
    }  # fmt: skip
    ends = dict(zip(added, ("diff", "diff_b", "w_norm"), strict=True))
    held = {
        f"lycoris_{n.rpartition('.')[0].replace('.', '_')}.{ends[n]}": t for n, t in added.items()
    }
    file, out = saved(tmp_path / "x.safetensors", held), tmp_path / "out"
    done = CliRunner().invoke(app, ["merge", str(base), str(file), "-o", str(out)])
    assert done.exit_code == 0, done.output
    before, after = (load_file(d / "model.safetensors") for d in (base, out))
    for name, w in before.items():
        np.testing.assert_array_equal(after[name], w + added.get(name, np.float32(0)))
    kohya.write(kohya.read(file), tmp_path)
    again = load_file(tmp_path / "lora.safetensors")
    assert again.keys() == held.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(again[name], tensor)


def test_an_alpha_that_is_no_number_is_refused(tmp_path):
    file = saved(tmp_path / "x.safetensors", pair(alpha=np.array([1, 2], np.float32)))
    with pytest.raises(FormatError) as error:
        kohya.read(file)
    assert str(error.value) == (
        f"{file}: {AT}.alpha  F32 [2] is no finite number, as an alpha must be. Restore the file."
    )


def test_what_the_file_cannot_say_is_refused(tmp_path):
    made = adapter([lora("a.b", 4, 5), lora("wte", 4, 5, layout="embedding")])
    made = replace(made, replaced={"lm_head.weight": TensorInfo("lm_head.weight", "F32", (4, 5))})
    with pytest.raises(FormatError) as error:
        kohya.write(made, tmp_path)
    assert str(error.value) == (
        "made/by-hand: wte.weight is adapted as an embedding, which kohya cannot say (1 more like it). "
        "Merge it, convert it, or write another dialect."
    )
    with pytest.raises(FormatError) as error:
        kohya.write(adapter([lora("a.b_c", 4, 5), lora("a_b.c", 4, 5)]), tmp_path)
    assert str(error.value) == (
        "made/by-hand: a_b.c and another module are both lycoris_a_b_c with _ for . Write another dialect."
    )
    made = adapter([site("a", AdapterConfig("vera", 1, 1.0), {"b": numbers((4,))})])
    with pytest.raises(FormatError) as error:
        kohya.write(made, tmp_path)
    assert str(error.value) == (
        "made/by-hand: a is a vera, which kohya cannot say. Merge it, convert it, or write another dialect."
    )


def test_joined_names_are_for_no_other_dialect(tmp_path):
    found = kohya.read(saved(tmp_path / "x.safetensors", pair()))
    with pytest.raises(FormatError) as error:
        peft.write(found, tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'x.safetensors'}: the names of its modules have _ for ., and PEFT needs them as the "
        "model has them. Give the base."
    )


def test_problems_may_be_left_out_by_pattern(tmp_path):
    found = kohya.read(saved(tmp_path / "x.safetensors", {**pair(), f"{AT}.gain": numbers((6,))}))
    left = refuse(found.path, found.problems, ["*.gain"])
    assert [p.name for p in left] == [f"{AT}.gain"]
    assert json.dumps(found.settings) == '{"metadata": {}}'


def test_what_lycoris_would_compute_otherwise_is_refused(tmp_path):
    dora_config = AdapterConfig("dora", 3, 6.0)
    factors = {"A": numbers((3, 8)), "B": numbers((4, 3)), "m": numbers((1, 8)) + 4}
    with pytest.raises(FormatError) as error:
        kohya.write(adapter([site("c", dora_config, factors, kernel=(2, 2))]), tmp_path)
    assert str(error.value) == (
        "made/by-hand: c norms each column of a convolution, which LyCORIS does not. Merge it."
    )
    config = AdapterConfig("lokr", 1, 1.0, extra={"last_dimensions": True})
    factors = {"W1": numbers((2, 2)), "W2": numbers((2, 3, 5))}
    with pytest.raises(FormatError) as error:
        kohya.write(adapter([site("c", config, factors, sides=(4, 30))]), tmp_path)
    assert str(error.value) == (
        "made/by-hand: c is PEFT's LoKr of a Conv1d, which LyCORIS multiplies out otherwise. Convert it to LoRA."
    )


def test_a_scale_that_whole_parts_have_no_alpha_for_is_in_the_first(tmp_path):
    factors = {"W1": numbers((2, 3)), "W2": numbers((4, 5), 1)}
    kohya.write(
        adapter([site("c", AdapterConfig("lokr", 4, 2.0), factors, sides=(8, 15))]), tmp_path
    )
    stored = load_file(tmp_path / "lora.safetensors")
    np.testing.assert_array_equal(stored["lycoris_c.lokr_w1"], factors["W1"] / 2)
    np.testing.assert_array_equal(stored["lycoris_c.lokr_w2"], factors["W2"])
    assert kohya.read(tmp_path).sites[0].config.scaling == 1.0
