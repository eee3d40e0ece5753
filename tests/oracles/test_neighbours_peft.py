"""LoHa, LoKr, OFT, IA3 and LoRA's changed bases as real PEFT makes them: merged, written back, taken out, and verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merging import done
from neighbour_cases import CASES, NF4, STARTED
from neighbours import PIXELS, Case, convolutions, make, merged_by_peft, same_parameters
from packed import Quantized, decoded
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from tiny import Base, outputs, tensors

from lorasurgery.dialects import peft as dialect

Bases = Callable[..., Base]
PT = {"format": "pt"}
EACH = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def base_of(bases: Bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    network = convolutions(tmp_path_factory.mktemp("convolutions") / "base")
    return lambda kind: network if kind == "convolutions" else bases(kind)


@EACH
def test_the_merged_directory_is_the_model_that_peft_merges(
    base_of: Callable[[str], Base], tmp_path: Path, case: Case
) -> None:
    base = base_of(case.kind)
    adapter = make(base, tmp_path / "adapter", case.config)
    done("merge", base.path, adapter, "-o", tmp_path / "merged")
    wanted, before = merged_by_peft(base, adapter), dict(base.load().named_parameters())
    for name in case.changes:  # or else there would be nothing to see
        change = dict(wanted.named_parameters())[name] - before[name]
        assert change.norm() > 0.01 * before[name].norm(), name
    # singular vectors and Q differ between libraries by more than a rounding
    tolerance = 1e-5 if case in STARTED else 1e-6
    same_parameters(base.load(tmp_path / "merged"), wanted, tolerance)


@EACH
def test_what_is_read_and_written_is_the_same_file_and_peft_computes_the_same_with_it(
    base_of: Callable[[str], Base], tmp_path: Path, case: Case
) -> None:
    base = base_of(case.kind)
    adapter, ours = make(base, tmp_path / "adapter", case.config), tmp_path / "ours"
    ours.mkdir()
    dialect.write(dialect.read(adapter), ours)
    wanted, found = tensors(adapter), tensors(ours)
    assert found.keys() == wanted.keys()
    for name, factor in wanted.items():
        assert torch.equal(found[name], factor), name
    loaded = [PeftModel.from_pretrained(base.load(), path).eval() for path in (adapter, ours)]
    taken = [get_peft_model_state_dict(model) for model in loaded]
    for name, factor in wanted.items():  # PEFT leaves out in silence what it has no place for
        if ".base_layer." not in name:
            assert all(torch.equal(state[name], factor) for state in taken), name
    with torch.inference_mode():
        if case.kind == "convolutions":
            one, two = (model(PIXELS) for model in loaded)
        else:
            one, two = (outputs(model) for model in loaded)
    assert torch.equal(one, two)


@EACH
def test_the_undo_file_brings_the_base_back_and_the_merged_model_verifies(
    base_of: Callable[[str], Base], tmp_path: Path, case: Case
) -> None:
    base, undo = base_of(case.kind), tmp_path / "undo"
    adapter = make(base, tmp_path / "adapter", case.config)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", "--undo", undo)
    done("verify", tmp_path / "merged", "--base", base.path, "--adapter", adapter)
    done("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back", "--undo", undo)
    for file in base.path.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("case", NF4, ids=str)
def test_an_nf4_base_is_merged_as_peft_merges_what_it_decodes_to(
    quantized: Quantized, tmp_path: Path, case: Case
) -> None:
    original, base, _ = quantized
    names = [n for n in tensors(original.path) if n.endswith("proj.weight")]
    plain = {**tensors(original.path), **{n: decoded(base.path, n) for n in names}}
    floats = Base(tmp_path / "plain", original.auto, torch.float32)
    floats.path.mkdir()
    save_file({n: t.float() for n, t in plain.items()}, floats.path / "model.safetensors", PT)
    (floats.path / "config.json").write_bytes((original.path / "config.json").read_bytes())
    adapter, undo = make(floats, tmp_path / "adapter", case.config), tmp_path / "undo"
    flags = ("--dtype", "float32", "--undo", undo)
    done("merge", base.path, adapter, "-o", tmp_path / "merged", *flags)
    tolerance = 1e-5 if case in STARTED else 1e-6
    same_parameters(floats.load(tmp_path / "merged"), merged_by_peft(floats, adapter), tolerance)
    done("verify", tmp_path / "merged", "--base", base.path, "--adapter", adapter)
    done("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back", "--undo", undo)
    for file in base.path.glob("*.safetensors"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
