"""diffusers' file: parts of a pipeline, all spellings of its keys, alphas, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import adapter, delta, lora, numbers, site
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lorasurgery.adapter import AdapterConfig
from lorasurgery.dialects import diffusers
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.tensors import TensorInfo

A, B = numbers((3, 8)), numbers((6, 3), 1)


def saved(path: Path, tensors: dict[str, Any], facts: object = None) -> Path:
    metadata = None if facts is None else {"lora_adapter_metadata": json.dumps(facts)}
    save_file({name: np.asarray(t) for name, t in tensors.items()}, path, metadata=metadata)
    return path


SPELLINGS = {
    "unet.mid.to_q.lora_{}.weight": ("AB", "unet.mid.to_q"),
    "unet.mid.to_q.lora.{}.weight": (("down", "up"), "unet.mid.to_q"),
    "text_encoder.h.0.fc1.lora_linear_layer.{}.weight": (("down", "up"), "text_encoder.h.0.fc1"),
    "unet.mid.attn.processor.to_k_lora.{}.weight": (("down", "up"), "unet.mid.attn.to_k"),
    "unet.mid.attn.processor.to_out_lora.{}.weight": (("down", "up"), "unet.mid.attn.to_out.0"),
    "text_encoder.h.0.attn.to_q_lora.{}.weight": (("down", "up"), "text_encoder.h.0.attn.q_proj"),
    "text_encoder_2.h.0.attn.to_out_lora.{}.weight": (("down", "up"), "text_encoder_2.h.0.attn.out_proj"),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_layer_is_read(tmp_path, spelling):
    (down, up), module = SPELLINGS[spelling]
    file = saved(tmp_path / "x.safetensors", {spelling.format(down): A, spelling.format(up): B})
    assert diffusers.detect(file)
    found = diffusers.read(file)
    assert found.problems == ()
    assert [site.module for site in found.sites] == [module]
    # without a word on alpha it is the rank
    np.testing.assert_array_equal(delta(found.sites[0]), B @ A)


def test_an_alpha_beside_the_factors_is_of_its_module(tmp_path):
    at = "transformer.blocks.0.q"
    tensors = {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B, f"{at}.alpha": np.float32(6)}
    (site,) = diffusers.read(saved(tmp_path / "x.safetensors", tensors)).sites
    np.testing.assert_array_equal(delta(site), 2 * B @ A)


def test_the_metadata_of_each_part_says_how_its_modules_are_scaled(tmp_path):
    tensors = {}
    for module in ("unet.a.q", "unet.b.q", "text_encoder.q"):
        tensors |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    facts = {
        "unet.r": 3, "unet.lora_alpha": 6, "unet.alpha_pattern": {"b.q": 12}, "unet.target_modules": ["q"],
        "text_encoder.r": 3, "text_encoder.lora_alpha": 4.5, "text_encoder.use_rslora": False,
        "unet.base_model_name_or_path": "org/model",
    }  # fmt: skip
    found = diffusers.read(saved(tmp_path / "x.safetensors", tensors, facts))
    assert found.problems == ()
    assert found.base == "org/model"
    assert {s.module: s.config.scaling for s in found.sites} == {
        "unet.a.q": 2.0, "unet.b.q": 4.0, "text_encoder.q": 1.5,
    }  # fmt: skip


def test_the_file_of_one_model_has_no_parts(tmp_path):
    tensors = {"blocks.0.q.lora_A.weight": A, "blocks.0.q.lora_B.weight": B}
    file = saved(tmp_path / "x.safetensors", tensors, {"r": 3, "lora_alpha": 6})
    assert diffusers.detect(file)
    (site,) = diffusers.read(file).sites
    assert (site.module, site.config.scaling) == ("blocks.0.q", 2.0)
    # without metadata nothing says that these keys are diffusers'
    assert not diffusers.detect(saved(tmp_path / "y.safetensors", tensors))


def test_parts_convolutions_magnitudes_and_biases_are_written_and_read_again(tmp_path):
    conv = replace(lora("unet.conv", 6, 72), kernel=(3, 3))
    dora = lora("text_encoder.fc1", 6, 8, AdapterConfig("dora", 3, 6.0))
    rows = replace(lora("text_encoder.conv", 6, 72, AdapterConfig("dora", 3, 6.0)), kernel=(3, 3))
    made = adapter(
        [conv, lora("unet.q", 6, 8, AdapterConfig("lora", 2, 1.0)), dora, rows],
        added={"unet.q.bias": TensorInfo("unet.q.bias", "F32", (6,))},
        load_added=lambda _: numbers((6,), 5),
    )
    diffusers.write(made, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    stored = load_file(file)
    assert stored["unet.conv.lora_A.weight"].shape == (3, 8, 3, 3)
    assert stored["unet.conv.lora_B.weight"].shape == (6, 3, 1, 1)
    assert stored["text_encoder.fc1.lora_magnitude_vector"].shape == (6,)
    assert stored["text_encoder.conv.lora_magnitude_vector"].shape == (1, 6, 1, 1)
    found = diffusers.read(file)
    assert found.problems == ()
    assert found.base == "made/base"
    for one, two in zip(found.sites, made.sites, strict=True):
        assert (one.module, one.kernel, one.config) == (two.module, two.kernel, two.config)
        assert one.load().keys() == two.load().keys()
        for name, factor in two.load().items():
            np.testing.assert_array_equal(one.load()[name], factor)
    np.testing.assert_array_equal(found.load_added("unet.q.bias"), numbers((6,), 5))


def test_the_metadata_is_written_by_part(tmp_path):
    diffusers.write(adapter([lora("unet.q", 6, 8), lora("text_encoder.q", 6, 8)]), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "np") as file:
        facts = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {name.partition(".")[0] for name in facts} == {"unet", "text_encoder"}
    assert (facts["unet.r"], facts["unet.lora_alpha"], facts["unet.target_modules"]) == (
        3,
        6,
        ["q"],
    )


PAIR = {"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}
REFUSED = {
    "alpha twice": (
        {**PAIR, "unet.q.alpha": np.float32(1)}, {"unet.r": 3}, FormatError,
        "{}: unet.q.alpha is an alpha beside lora_adapter_metadata, which has one too, and diffusers refuses "
        "both. Take one of them away.",
    ),
    "a factor twice": (
        {**PAIR, "unet.q.lora.down.weight": A}, None, FormatError,
        "{}: unet.q.lora_A.weight and unet.q.lora.down.weight are both the A of q. Restore the file.",
    ),
    "metadata that is no object": (PAIR, [1], FormatError, "{}: lora_adapter_metadata is no JSON object. Restore the file."),
    "fields of a part and of none": (
        PAIR, {"unet.r": 3, "r": 3}, FormatError,
        "{}: lora_adapter_metadata has fields of unet and of no part (r). Restore the file.",
    ),
    "a meaning that is not understood": (
        PAIR, {"unet.r": 3, "unet.use_qalora": True}, MatchError,
        "{}: use_qalora is True: its A works on pooled inputs. Merge it with PEFT itself.",
    ),
    "alphas": (
        {**PAIR, "unet.q.alpha": np.ones(2, np.float32)}, None, FormatError,
        "{}: unet.q: unet.q.alpha  F32 [2] is no number. Restore the file.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_ambiguous_is_refused(tmp_path, case):
    tensors, facts, kind, message = REFUSED[case]
    file = saved(tmp_path / "x.safetensors", tensors, facts)
    with pytest.raises(kind) as error:
        diffusers.read(file)
    wanted = message.format(file)
    found = str(error.value)
    assert found in (wanted, wanted.replace(
        "unet.q.lora_A.weight and unet.q.lora.down.weight", "unet.q.lora.down.weight and unet.q.lora_A.weight"
    ))  # fmt: skip


PROBLEMS = {
    "a strange key": ({"unet.conv_in.weight": A}, "unet.conv_in.weight F32 [3, 8] is no factor that is known"),
    "another part": ({"vae.q.lora_A.weight": A}, "vae.q.lora_A.weight F32 [3, 8] is no factor that is known"),
    "a factor alone": (
        {"unet.k.lora_B.weight": B}, "unet.k.lora_B.weight stands alone: A (down) of unet.k is missing",
    ),
    "an alpha alone": ({"unet.k.alpha": np.float32(1)}, "unet.k.alpha stands alone: unet.k has no factors"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_not_understood_is_a_problem_by_its_name(tmp_path, case):
    tensors, message = PROBLEMS[case]
    found = diffusers.read(saved(tmp_path / "x.safetensors", {**PAIR, **tensors}))
    assert [p.message for p in found.problems] == [message]
    assert [site.module for site in found.sites] == ["unet.q"]


def test_a_rank_that_the_metadata_does_not_say_is_a_problem(tmp_path):
    found = diffusers.read(
        saved(tmp_path / "x.safetensors", PAIR, {"unet.r": 4, "unet.lora_alpha": 4})
    )
    assert [p.message for p in found.problems] == [
        "unet.q: A [3, 8], B [6, 3] are no factors of rank 4"
    ]


def test_what_the_file_cannot_say_is_refused(tmp_path):
    with pytest.raises(FormatError) as error:
        diffusers.write(adapter([lora("unet.q", 6, 8), lora("model.q", 6, 8)]), tmp_path)
    assert str(error.value) == (
        "made/by-hand: model.q is below none of the pipeline's parts, and other modules are below unet. "
        "Write two adapters."
    )
    made = adapter([lora("unet.q", 6, 8)], dialect="kohya")
    with pytest.raises(FormatError) as error:
        diffusers.write(made, tmp_path)
    assert str(error.value) == (
        "made/by-hand: the names of its modules have _ for ., and diffusers needs them as the model has them. "
        "Give the base."
    )


def test_columns_that_are_normed_are_refused(tmp_path):
    factors = {"A": A, "B": B, "m": numbers((1, 8)) + 4}
    made = adapter([site("unet.q", AdapterConfig("dora", 3, 6.0), factors)])
    with pytest.raises(FormatError) as error:
        diffusers.write(made, tmp_path)
    assert str(error.value) == (
        "made/by-hand: unet.q norms each column, and PEFT each row. Merge it."
    )


def test_what_is_added_to_no_module_that_is_adapted_is_refused(tmp_path):
    bias = {"unet.k.bias": TensorInfo("unet.k.bias", "F32", (6,))}
    with pytest.raises(FormatError) as error:
        diffusers.write(adapter([lora("unet.q", 6, 8)], added=bias), tmp_path)
    assert str(error.value) == (
        "made/by-hand: unet.k.bias is added, but no factors adapt its module. Merge it."
    )
