"""fit: what a runtime is given computes the same as what was trained, by the one rule that it knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small
from handmade import BASE_CONFIG, HIDDEN, WIDE, adapter, delta, llama, lora, numbers, site

from lorasurgery import plugins
from lorasurgery.adapter import Adapter, AdapterConfig
from lorasurgery.dialects import kohya, peft
from lorasurgery.errors import MatchError, UnknownNameError
from lorasurgery.model import open_model
from lorasurgery.operations.lint import lint
from lorasurgery.operations.runtimes.claims import RUNTIMES
from lorasurgery.operations.runtimes.fit import fit
from lorasurgery.tensors import TensorInfo

# the scale is rounded into each of at most 4 products of at most 8, which may then cancel
CLOSE = {"rtol": 1e-6, "atol": 4e-6}


def mixed() -> Adapter:
    """Llama's names with ranks and alphas that differ, one of them rank-stabilized."""
    made = llama()
    config = AdapterConfig("lora", 4, 6.0, rank_stabilized=True)
    return replace(
        made, sites=(*made.sites, lora("model.layers.0.mlp.up_proj", WIDE, HIDDEN, config))
    )


@pytest.mark.parametrize("runtime", [r for r in RUNTIMES if r != "peft"])
def test_what_is_fitted_is_written_and_computes_the_same_where_no_scale_is_read(runtime, tmp_path):
    made = mixed()
    found = fit(made, runtime)
    assert found.dialect == RUNTIMES[runtime].layouts[0]
    for before, after in zip(made.sites, found.adapter.sites, strict=True):
        factors = after.load()
        assert after.config == AdapterConfig("lora", after.config.rank, float(after.config.rank))
        assert {n: f.shape for n, f in factors.items()} == {
            n: i.shape for n, i in after.factors.items()
        }
        # as a runtime computes it that knows no scale at all
        np.testing.assert_allclose(factors["B"] @ factors["A"], delta(before), **CLOSE)
    dialect = plugins.load("dialects", found.dialect)
    dialect.write(found.adapter, tmp_path)
    rows = lint(tmp_path, runtime).rows
    assert all(row.verdict == "ok" for row in rows), rows
    again = {s.module.replace(".", "_"): s for s in dialect.read(tmp_path).sites}
    for before in made.sites:
        after = again[before.module.replace(".", "_")]
        np.testing.assert_allclose(delta(after), delta(before), **CLOSE)


@pytest.mark.parametrize(
    ("runtime", "ranks"), [("vllm", {8}), ("sglang", {4}), ("kohya", {2, 3, 4})]
)
def test_ranks_are_filled_up_to_one_that_there_is_room_for(runtime, ranks):
    found = fit(mixed(), runtime)
    assert {s.config.rank for s in found.adapter.sites} == ranks


def test_what_was_done_is_said():
    assert fit(mixed(), "vllm").notes == (
        "the scale of 6 modules is baked into B; alpha is the rank",
        "6 modules are filled up with zeros to rank 8",
    )
    assert fit(adapter([lora("a", 4, 6, AdapterConfig("lora", 8, 8.0))]), "vllm").notes == ()


def test_for_peft_nothing_is_touched():
    made = mixed()
    found = fit(made, "peft")
    assert found.adapter.sites == made.sites
    assert (found.dialect, found.notes) == ("peft", ())


def test_a_variant_that_equals_a_lora_is_written_as_one():
    factors = {
        "B1": numbers((24, 2)), "A1": numbers((2, 30), 1), "B2": numbers((24, 2), 2), "A2": numbers((2, 30), 3),
    }  # fmt: skip
    made = adapter([site("m", AdapterConfig("loha", 2, 3.0), factors, sides=(24, 30))])
    found = fit(made, "vllm")
    (one,) = found.adapter.sites
    assert (one.config.variant, one.config.rank, one.size) == ("lora", 8, (24, 30))
    wanted = 1.5 * (factors["B1"] @ factors["A1"]) * (factors["B2"] @ factors["A2"])
    np.testing.assert_allclose(delta(one), wanted, rtol=1e-5, atol=1e-5)
    assert found.notes[0] == "1 modules of other variants are written as the LoRA that they equal"
    # LyCORIS reads it as it is
    assert fit(made, "kohya").adapter.sites == made.sites


def test_a_dora_stays_where_it_is_read():
    made = adapter([lora("m.q", 4, 6, AdapterConfig("dora", 3, 6.0))])
    for runtime in ("diffusers", "kohya", "peft"):
        assert fit(made, runtime).adapter.sites == made.sites
    with pytest.raises(MatchError) as error:
        fit(made, "vllm")
    assert str(error.value) == (
        "made/by-hand: m.q is a dora, which vllm is not known to read and which is no product of small "
        "factors. Pass --rank and --base: the nearest LoRA of that rank is written, with its error. Or merge it."
    )


def test_joined_names_are_found_in_the_base_first(tmp_path):
    base = open_model(small.base(tmp_path / "base"))
    (tmp_path / "kohya").mkdir()
    source = peft.read(small.adapter(tmp_path / "peft"))
    kohya.write(source, tmp_path / "kohya")
    joined = kohya.read(tmp_path / "kohya")
    found = fit(joined, "vllm", base)
    assert [s.module for s in found.adapter.sites] == [s.module for s in source.sites]
    assert found.adapter.base_config["model_type"] == "llama"
    with pytest.raises(MatchError) as error:
        fit(joined, "vllm")
    assert str(error.value) == (
        f"{tmp_path / 'kohya'}: the names of its modules have _ for ., which only the model's own names can "
        "undo. Give the base."
    )
    # for kohya they stay as they are
    assert fit(joined, "kohya").adapter.sites[0].module == joined.sites[0].module


def test_a_module_that_the_base_lacks_is_named(tmp_path):
    base = open_model(small.base(tmp_path / "base"))
    (tmp_path / "kohya").mkdir()
    kohya.write(adapter([lora("unet.mid_proj", 4, 6)]), tmp_path / "kohya")
    with pytest.raises(MatchError) as error:
        fit(kohya.read(tmp_path / "kohya"), "vllm", base)
    assert str(error.value).startswith(
        f"{tmp_path / 'kohya'}: unet.mid_proj is no module of {base.path}. "
    )
    made = adapter([lora("model.layers.7.mlp.up_proj", small.WIDE, small.HIDDEN)])
    with pytest.raises(MatchError) as error:
        fit(made, "llamacpp", base)
    assert str(error.value) == (
        "made/by-hand: llamacpp cannot hold modules that the base lacks (model.layers.7.mlp.up_proj.A): the "
        "base has no such tensor. Merge it, or leave it out."
    )


def refused(made: Adapter, runtime: str) -> str:
    with pytest.raises(MatchError) as error:
        fit(made, runtime)
    return str(error.value).removeprefix("made/by-hand: ")


def test_what_a_runtime_cannot_hold_is_refused_with_the_reason():
    whole = {"lm_head.weight": TensorInfo("lm_head.weight", "F32", (4, 4))}
    made = adapter([lora("a", 4, 6), lora("e", 4, 6, layout="embedding")], replaced=whole)
    assert refused(made, "vllm") == (
        "vllm cannot hold embeddings (e): nobody has looked whether it reads them; modules_to_save "
        "(lm_head.weight): modules_to_save must be null. Merge it, or leave it out."
    )
    assert refused(adapter([lora("a", 4, 6, AdapterConfig("lora", 600, 1.0))]), "vllm") == (
        "a is of rank 600, and vllm has room for 512. Prune it first."
    )
    with pytest.raises(
        UnknownNameError, match=r"^--for nowhere: no such runtime is known\. Known: "
    ):
        fit(made, "nowhere")


def test_the_base_config_is_kept_where_there_is_no_base():
    assert fit(llama(), "llamacpp").adapter.base_config == BASE_CONFIG
    assert fit(replace(llama(), path=Path("x")), "llamacpp").dialect == "gguf_lora"
