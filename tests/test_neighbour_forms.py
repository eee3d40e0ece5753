"""What the forms of LoHa, LoKr, OFT and IA3 refuse, and what needs peft installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from merge_files import IN, OUT, PREFIX, Arrays, Q, V, adapter, array, make_base, refused, surgery
from safetensors.numpy import save_file

from lorasurgery.adapters import peft_bridge
from lorasurgery.dialects import kohya, peft
from lorasurgery.errors import FormatError, MatchError

RANK = 3
TARGETS = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": None}
LOHA = {**TARGETS, "peft_type": "LOHA", "r": RANK, "alpha": 5}
LOKR = {**TARGETS, "peft_type": "LOKR", "r": RANK, "alpha": 5}
OFT = {**TARGETS, "peft_type": "OFT", "r": 0, "oft_block_size": 4, "peft_version": "0.18.0"}
IA3 = {**TARGETS, "peft_type": "IA3", "r": None, "feedforward_modules": ["v_proj"]}


HRA = {"peft_type": "HRA", "r": 4, "lora_alpha": None}


def hada(module: str, **shapes: tuple[int, ...]) -> Arrays:
    sizes = {"w1_a": (OUT, RANK), "w1_b": (RANK, IN), "w2_a": (OUT, RANK), "w2_b": (RANK, IN)}
    return {f"{PREFIX}{module}.hada_{n}": array(*s) for n, s in {**sizes, **shapes}.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def without(tensors: Arrays, end: str) -> Arrays:
    return {name: t for name, t in tensors.items() if not name.endswith(end)}


W1, W2 = f"{PREFIX}{Q}.lokr_w1", f"{PREFIX}{Q}.lokr_w2"
ROTATION, SCALES = f"{PREFIX}{Q}.oft_R.weight", f"{PREFIX}{V}.ia3_l"
FIRST = f"{PREFIX}{Q}.hada_w1_a"
CORE = f"{PREFIX}{Q}.hada_t1"
OF = "which the config gives this module"


@pytest.mark.parametrize(
    ("config", "tensors", "part", "message"),
    [
        (LOHA, without(hada(Q), "w2_b"), FIRST,
         f"{FIRST} is not enough: hada_w2_b of {Q} is missing"),
        (LOHA, hada(Q, t1=(RANK, RANK, 3, 3)), CORE,
         f"{CORE} is not enough: hada_t2 of {Q} is missing"),
        (LOHA, hada(Q, w1_b=(2, IN)), FIRST,
         f"{Q}: hada_w1_a [8, 3], hada_w1_b [2, 12], hada_w2_a [8, 3], hada_w2_b [3, 12] are no factors "
         f"of rank 3, {OF}"),
        (LOHA, hada("model.layers.0.self_attn.o_proj"),
         FIRST.replace("q_proj", "o_proj"),
         f"{FIRST.replace('q_proj', 'o_proj')}: the config's target_modules ['q_proj', 'v_proj'] do not "
         "name model.layers.0.self_attn.o_proj"),
        (LOKR, {W1: array(2, 3)}, W1, f"{W1} is not enough: lokr_w2_a and lokr_w2_b of {Q} is missing"),
        (LOKR, {W1: array(2, 3), f"{W2}_a": array(4, 2), f"{W2}_b": array(2, 4)}, W1,
         f"{Q}: lokr_w1 [2, 3], lokr_w2_a [4, 2], lokr_w2_b [2, 4] are no factors of rank 3, {OF}"),
        (OFT, {ROTATION: array(3, 7)}, ROTATION,
         f"{Q}: oft_R [3, 7] is not what is above the diagonals of square blocks"),
        (IA3, {SCALES: array(OUT, 1)}, SCALES,
         f"{V}: ia3_l [8, 1] scales no inputs, as feedforward_modules would have it"),
    ],
    ids=["a factor", "a core", "ranks", "no target", "both of W2", "a rank", "no triangle", "outputs"],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(
    base: Path, config: Mapping[str, Any], tensors: Arrays, part: str, message: str
) -> None:
    path = adapter(base.parent / "a", tensors, config)
    assert refused(base, path) == (
        f"{path}: {message}. Mend it, or leave it out with --allow-unmatched '{part}'."
    )


def test_factors_of_another_size_than_the_weights_are_refused(base: Path) -> None:
    path = adapter(base.parent / "a", hada(Q, w1_a=(9, RANK), w2_a=(9, RANK)), LOHA)
    assert refused(base, path) == (
        f"{path}: {Q}: the factors are of a weight of [9, 12], but {Q}.weight in {base} is [8, 12]. Mend "
        f"it, or leave it out with --allow-unmatched '{FIRST}'."
    )


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (LOHA, hada(Q)), (LOKR, {W1: array(2, 3), W2: array(4, 4)}), (OFT, {ROTATION: array(3, 6)}),
        (IA3, {SCALES: array(1, IN)}),
    ],
    ids=["LoHa", "LoKr", "OFT", "IA3"],
)  # fmt: skip
def test_a_field_that_nobody_knows_is_refused(
    base: Path, config: Mapping[str, Any], tensors: Arrays
) -> None:
    path = adapter(base.parent / "a", tensors, {**config, "twisted": True})
    message = refused(base, path)
    assert message.startswith(f"{path}: config field 'twisted' is unknown. Did you mean ")
    assert message.endswith(". Mend it, or leave it out with --allow-unmatched 'twisted'.")


def test_an_oft_of_the_old_kind_is_refused(base: Path) -> None:
    fields = {name: value for name, value in OFT.items() if name != "oft_block_size"}
    path = adapter(base.parent / "a", {ROTATION: array(3, 6)}, fields)
    assert refused(base, path) == (
        f"{path}/adapter_config.json: OFT without oft_block_size is of PEFT before 0.16, whose blocks "
        "meant something else. Train it anew, or merge it with that PEFT."
    )


def test_an_oft_whose_series_ended_otherwise_is_refused(base: Path) -> None:
    fields = {**OFT, "use_cayley_neumann": True, "peft_version": "0.17.1"}
    path = adapter(base.parent / "a", {ROTATION: array(3, 6)}, fields)
    assert refused(base, path) == (
        f"{path}: peft_version '0.17.1' with use_cayley_neumann: before 0.18 the series had another last "
        "term. Mend it, or leave it out with --allow-unmatched 'peft_version'."
    )


def test_without_peft_its_own_types_say_what_to_install(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    path = adapter(base.parent / "a", {f"{PREFIX}{Q}.hra_u": array(IN, 4)}, HRA)
    assert refused(base, path, code=2) == (
        "peft is not installed, whose own layers such adapters need. Run pip install "
        "'lorasurgery[peft]'."
    )


def test_what_pefts_layer_does_not_take_is_refused(base: Path) -> None:
    path = adapter(base.parent / "a", {f"{PREFIX}{Q}.hra_w": array(IN, 4)}, HRA)
    key = f"{PREFIX}{Q}.hra"
    assert refused(base, path) == (
        f"{Q}: peft {version('peft')} and the adapter's file do not agree on {key}_u [12, 4], {key}_w [12, "
        "4]. Merge it with the peft that wrote it."
    )


def test_a_module_without_a_bias_is_scaled_all_the_same(base: Path) -> None:
    fields = {**IA3, "feedforward_modules": []}
    tensors = {f"{PREFIX}{Q}.ia3_l": array(OUT, 1), SCALES: array(OUT, 1)}
    path = adapter(base.parent / "a", tensors, fields)
    sites = peft.read(path).sites
    assert [(s.module, s.parameter) for s in sites if s.optional] == [(Q, "bias"), (V, "bias")]
    result = surgery("merge", base, path, "-o", base.parent / "out")
    assert result.exit_code == 0, result.stderr
    from safetensors.numpy import load_file

    before, after = (load_file(d / "model.safetensors") for d in (base, base.parent / "out"))
    for name in (f"{Q}.weight", f"{V}.weight"):
        np.testing.assert_allclose(after[name], before[name] * array(OUT, 1), rtol=1e-6)
    np.testing.assert_allclose(
        after[f"{V}.bias"], before[f"{V}.bias"] * array(OUT, 1)[:, 0], rtol=1e-6
    )


UNILORA = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 9, "lora_alpha": None}
THETA = {"base_model.unilora_theta_d": array(9)}
FROD = {"peft_type": "FROD", "save_projection": False, "lora_alpha": None, "r": None}
PVERA = {"peft_type": "PVERA", "r": 2, "save_projection": False, "lora_alpha": None}


def test_what_is_drawn_for_a_whole_model_needs_its_architecture(base: Path) -> None:
    path = adapter(base.parent / "a", THETA, UNILORA)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert refused(base, path) == (
        "config.json: architectures None names no model of transformers, whose modules' order tells what "
        "was drawn for each. Restore the base's config.json."
    )


def test_projections_of_frod_are_stored_or_refused(base: Path) -> None:
    path = adapter(base.parent / "a", {f"{PREFIX}{Q}.frod_lambda_l": array(IN)}, FROD)
    assert refused(base, path) == (
        f"{path}: save_projection is false: frod_V is made of the base's weights of all layers at once. Save "
        "it with its projections."
    )


def test_projections_that_are_drawn_need_every_module(base: Path) -> None:
    other = Q.replace("layers.0", "layers.7")
    tensors = {f"{PREFIX}{other}.pvera_lambda_b": array(OUT)}
    path = adapter(base.parent / "a", tensors, PVERA)
    assert refused(base, path) == (
        f"{path}: its projections are drawn for the widest module, and the base has no {other}. Name a base "
        "that has all of its modules."
    )


def test_without_its_base_an_adapter_that_needs_one_says_so(base: Path) -> None:
    tensors = {f"{PREFIX}{Q}.pvera_lambda_b": array(OUT)}
    path = adapter(base.parent / "a", tensors, PVERA)
    (site,) = peft.read(path).sites
    with pytest.raises(MatchError) as error:
        peft_bridge.delta(array(OUT, IN), site.load(), site.config)
    assert str(error.value) == (
        f"{path}: its projections are drawn for the widest module, which only the base tells. Name the base."
    )


def test_scales_that_leave_a_bias_are_no_ia3_of_pefts(base: Path) -> None:
    joined = Q.replace(".", "_")
    held = {f"lycoris_{joined}.weight": array(OUT), f"lycoris_{joined}.on_input": np.float32(0)}
    save_file({n: np.asarray(t) for n, t in held.items()}, base.parent / "x.safetensors")
    found = replace(kohya.read(base.parent / "x.safetensors"), dialect="surgery")
    with pytest.raises(FormatError) as error:
        peft.write(found, base.parent)
    assert str(error.value) == (
        f"{found.path}: {joined} is scaled without its bias, and PEFT's IA3 scales both. Merge it, or write "
        "kohya."
    )
