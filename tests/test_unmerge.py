"""unmerge: the base's own bytes with the undo file, whatever the merge was; to rounding without it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app
from tests import small

SIDE_FILES = ("surgery.json",)


def surgery(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def done(*arguments):
    result = surgery(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result


def files(folder: Path) -> dict[str, bytes]:
    found = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    return {name: data for name, data in found.items() if name not in SIDE_FILES}


def round_trip(tmp_path: Path, base: Path, adapters: list, *flags) -> Path:
    """Merge with an undo file and unmerge with it; the base must be back, every file of it."""
    undo = tmp_path / "u.undo"
    done("merge", base, *adapters, "-o", tmp_path / "merged", "--undo", undo, *flags)
    merged = files(tmp_path / "merged")
    assert merged != files(base)
    done("unmerge", tmp_path / "merged", *adapters, "-o", tmp_path / "back", "--undo", undo)
    assert files(tmp_path / "back") == files(base)
    return undo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_plain_base_comes_back_byte_for_byte(tmp_path, dtype):
    round_trip(tmp_path, small.base(tmp_path / "base", dtype), [small.adapter(tmp_path / "a")])


def test_a_sharded_base_comes_back_with_its_own_layout_and_index(tmp_path):
    base = small.base(tmp_path / "base", shards=3)
    round_trip(tmp_path, base, [small.adapter(tmp_path / "a")], "--max-shard-size", "20KB")


@pytest.mark.parametrize(
    "flags",
    [
        ("--rounding", "stochastic", "--seed", "5"),
        ("--dtype", "float32"),
        ("--dtype", "float16"),
        ("--max-memory", "1MB", "--jobs", "1"),
    ],
    ids=" ".join,
)
def test_the_base_comes_back_however_it_was_rounded(tmp_path, flags):
    base = small.base(tmp_path / "base")
    round_trip(tmp_path, base, [small.adapter(tmp_path / "a", size=30)], *flags)


def test_replaced_tensors_and_several_adapters_come_out_again(tmp_path):
    base = small.base(tmp_path / "base")
    first = small.adapter(
        tmp_path / "a", whole=("lm_head.weight", "q_proj.bias"), bias="all",
        modules_to_save=["lm_head"],
    )  # fmt: skip
    second = small.adapter(tmp_path / "b", ("q_proj",), seed=2, size=40)
    round_trip(tmp_path, base, [first, f"{second}:-0.5"])


def test_a_tied_pair_that_was_parted_is_one_again(tmp_path):
    base = small.base(tmp_path / "base")
    held = {n: t for n, t in small.tensors().items() if n != "lm_head.weight"}
    save_file(held, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(small.config(tie_word_embeddings=True)))
    adapter = small.adapter(tmp_path / "a", ("q_proj", "lm_head"))
    round_trip(tmp_path, base, [adapter], "--tied", "untie")
    assert "lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")


@pytest.mark.parametrize("double", ["--double-quant", "--no-double-quant"])
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--dtype", "float32"),
        ("--requantize", "rtn", "--min-retained", "-9"),
        ("--requantize", "keep-absmax", "--min-retained", "-9"),
        ("--requantize", "stochastic", "--seed", "3", "--min-retained", "-9"),
        ("--requantize", "residual", "--rank", "8"),
    ],
    ids=" ".join,
)
def test_an_nf4_base_comes_back_codes_and_scales(tmp_path, flags, double):
    plain = small.base(tmp_path / "plain")
    done("quantize", plain, "-o", tmp_path / "base", double)
    round_trip(tmp_path, tmp_path / "base", [small.adapter(tmp_path / "a", size=5)], *flags)


@pytest.mark.parametrize(
    "flags", [("--base-view", "original"), ("--requantize", "from-original")], ids=" ".join
)
def test_an_nf4_base_comes_back_from_a_merge_into_its_original(tmp_path, flags):
    plain = small.base(tmp_path / "plain")
    done("quantize", plain, "-o", tmp_path / "base")
    adapter = small.adapter(tmp_path / "a", size=5)
    round_trip(tmp_path, tmp_path / "base", [adapter], *flags, "--original", plain)


def test_the_undo_file_is_a_fraction_of_the_model(tmp_path):
    base = small.base(tmp_path / "base")
    undo = round_trip(tmp_path, base, [small.adapter(tmp_path / "a")])
    # bf16 rounds away about the last bit of a weight: some 2 bits each, of 16
    touched = sum(
        t.numel() for n, t in small.tensors().items() if n.endswith(("q_proj.weight", "up_proj.weight", "down_proj.weight"))
    )  # fmt: skip
    assert undo.stat().st_size < touched * 2 / 4 + 16_000


def test_another_adapter_is_refused(tmp_path):
    base, adapter = small.base(tmp_path / "base"), small.adapter(tmp_path / "a")
    other, undo = small.adapter(tmp_path / "b", seed=2), tmp_path / "u.undo"
    done("merge", base, adapter, "-o", tmp_path / "merged", "--undo", undo)
    result = surgery("unmerge", tmp_path / "merged", other, "-o", tmp_path / "x", "--undo", undo)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {undo}: was written when {adapter}:1 was merged, but {other}:1 is not that. Name the "
        "same adapters, in the same order, with the same weights.\n"
    )
    assert not (tmp_path / "x").exists()


def test_a_merged_weight_that_was_changed_since_is_named(tmp_path):
    base, adapter = small.base(tmp_path / "base"), small.adapter(tmp_path / "a")
    undo, merged = tmp_path / "u.undo", tmp_path / "merged"
    done("merge", base, adapter, "-o", merged, "--undo", undo)
    held = load_file(merged / "model.safetensors")
    held["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(held, merged / "model.safetensors")
    result = surgery("unmerge", merged, adapter, "-o", tmp_path / "x", "--undo", undo)
    assert result.exit_code == 3
    assert result.stderr == (
        f"error: {merged}: model.layers.1.mlp.up_proj.weight does not come back: its bytes differ from "
        "the base's. The merged weights were changed since, or another adapter was named.\n"
    )
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_no_undo_file_is_refused(tmp_path):
    base, adapter = small.base(tmp_path / "base"), small.adapter(tmp_path / "a")
    done("merge", base, adapter, "-o", tmp_path / "merged")
    file = base / "model.safetensors"
    result = surgery("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "x", "--undo", file)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {file}: is no undo file of this version. `merge --undo FILE` writes one.\n"
    )


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("merged/u", "lies inside the output. Name a file beside it."),
        ("a/adapter_config.json", "exists. Pass --overwrite, or name another file."),
        ("nowhere/u", "its directory does not exist. Make it first."),
    ],
)
def test_an_undo_file_goes_only_where_it_may(tmp_path, place, message):
    base, adapter = small.base(tmp_path / "base"), small.adapter(tmp_path / "a")
    undo = tmp_path / place
    result = surgery("merge", base, adapter, "-o", tmp_path / "merged", "--undo", undo)
    assert (result.exit_code, result.stderr) == (1, f"error: {undo}: {message}\n")
    assert not (tmp_path / "merged").exists()


def test_a_base_of_another_format_has_no_undo_file(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    torch.save(small.tensors(), base / "pytorch_model.bin")
    adapter = small.adapter(tmp_path / "a")
    result = surgery("merge", base, adapter, "-o", tmp_path / "m", "--undo", tmp_path / "u")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {base / 'pytorch_model.bin'}: an undo file brings back safetensors alone. Run "
        "`lorasurgery convert-checkpoint` first.\n"
    )


def test_without_an_undo_file_float32_comes_back_to_its_rounding_and_says_how_far(tmp_path):
    base = small.base(tmp_path / "base", torch.float32)
    adapter = small.adapter(tmp_path / "a", size=10)
    done("merge", base, adapter, "-o", tmp_path / "merged")
    out = done("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back", "--json").stdout
    total = json.loads(out)["total"]
    was, got = small.tensors(torch.float32), load_file(tmp_path / "back" / "model.safetensors")
    off, change = 0.0, 0.0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, w in was.items():
        off += (got[name].double() - w.double()).square().sum().item()
        change += (merged[name].double() - w.double()).square().sum().item()
    # what it expects is what is there, within the luck of roundings that meet
    assert 0.3 < total["expected_error"] / (off / change) ** 0.5 < 3
    assert total["tensors"] == 6


def test_without_an_undo_file_bfloat16_says_that_it_is_far(tmp_path):
    base, adapter = small.base(tmp_path / "base"), small.adapter(tmp_path / "a")
    done("merge", base, adapter, "-o", tmp_path / "merged")
    result = done("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back", "--json")
    total = json.loads(result.stdout)["total"]
    assert total["expected_error"] > 0.1
    assert total["exact"] == 0
    was, got = small.tensors(), load_file(tmp_path / "back" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, w in was.items():
        # two roundings, each of at most 2^-8 of what it rounds
        bound = 2**-8 * (merged[name].float().abs() + got[name].float().abs()) + 1e-30
        assert ((got[name].float() - w.float()).abs() <= bound * 1.01).all(), name


def test_without_an_undo_file_a_replaced_tensor_cannot_come_back(tmp_path):
    base = small.base(tmp_path / "base")
    adapter = small.adapter(tmp_path / "a", whole=("lm_head.weight",), modules_to_save=["lm_head"])
    done("merge", base, adapter, "-o", tmp_path / "merged")
    result = surgery("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {adapter}: lm_head.weight was replaced as a whole: only the undo file brings back the "
        "base's. Mend it, or leave it out with --allow-unmatched 'lm_head.weight'.\n"
    )
    allowed = ("--allow-unmatched", "lm_head.weight")
    done("unmerge", tmp_path / "merged", adapter, "-o", tmp_path / "back", *allowed)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert torch.equal(back["lm_head.weight"], merged["lm_head.weight"])


def dora(folder: Path) -> Path:
    """The small adapter, with magnitudes a tenth larger than the weights' norms."""
    path = small.adapter(folder, use_dora=True)
    held, weights = load_file(path / "adapter_model.safetensors"), small.tensors()
    for key in [k for k in held if ".lora_A." in k]:
        w = weights[key.removeprefix("base_model.model.").replace("lora_A.", "")].float()
        held[key.replace("lora_A.weight", "lora_magnitude_vector")] = 1.1 * w.norm(dim=1)
    save_file(held, path / "adapter_model.safetensors")
    return path


@pytest.mark.parametrize(
    "flags", [(), ("--max-memory", "1MB", "--jobs", "1"), ("--dtype", "float32")], ids=" ".join
)
def test_a_base_comes_back_from_a_change_that_depends_on_it(tmp_path, flags):
    round_trip(tmp_path, small.base(tmp_path / "base"), [dora(tmp_path / "a")], *flags)


def test_without_the_undo_file_what_depends_on_the_weight_is_not_subtracted(tmp_path):
    base, path = small.base(tmp_path / "base"), dora(tmp_path / "a")
    done("merge", base, path, "-o", tmp_path / "merged")
    result = surgery("unmerge", tmp_path / "merged", path, "-o", tmp_path / "back")
    assert result.exit_code == 1
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"{name}: what dora adds depends on the weight" in result.stderr
    assert not (tmp_path / "back").exists()
