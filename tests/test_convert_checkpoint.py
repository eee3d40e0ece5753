"""convert-checkpoint and dequantize: dtypes, shards, side files, and packed weights that are never cast."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from lorasurgery.errors import FormatError, ValueRangeError
from lorasurgery.operations.convert_checkpoint import convert_checkpoint
from lorasurgery.operations.dequantize import dequantize
from lorasurgery.output import INDEX, OutputOptions
from lorasurgery.report import Report
from lorasurgery.surgery import RunOptions

# tiles of 64 KiB, so that the larger tensors below take several
HOW = RunOptions(max_memory=8 << 16, threads=1)
TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def drawn(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def model(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def convert(
    source: Path, output: Path, dtype: str | None = None, **options: object
) -> tuple[Report, dict[str, torch.Tensor]]:
    how = RunOptions(OutputOptions(**options), max_memory=HOW.max_memory, threads=2)
    return convert_checkpoint(source, output, dtype, how), loaded(output)


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same dtype, shape and bytes; nan too."""
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


MIXED = {
    "w": drawn((300, 200)), "half": drawn((7, 5), torch.float16), "brain": drawn((9,), torch.bfloat16),
    "double": drawn((4, 4), torch.float64), "scalar": torch.tensor(1.2345678), "none": torch.zeros(0, 3),
    "ids": torch.arange(10), "mask": torch.tensor([True, False]), "bytes": torch.arange(5, dtype=torch.uint8),
    "f8": drawn((4, 4)).to(torch.float8_e4m3fn),
}  # fmt: skip


# --- .bin


def test_a_bin_file_becomes_safetensors_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    tied = {**MIXED, "tied": MIXED["w"], "turned": MIXED["w"].T, "part": MIXED["w"][10:20, ::2]}
    torch.save(tied, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    report, got = convert(tmp_path / "model", tmp_path / "out")
    assert sorted(got) == sorted(tied)
    assert [name for name in tied if not same(got[name], tied[name])] == []
    assert report.results == ()
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "surgery.json",
    ]  # fmt: skip


def test_sharded_bin_files_become_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    names = {"w": "pytorch_model-00001-of-00002.bin", "ids": "pytorch_model-00002-of-00002.bin"}
    for name, file in names.items():
        torch.save({name: MIXED[name]}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    _, got = convert(folder, tmp_path / "out")
    assert sorted(got) == ["ids", "w"]
    assert all(same(got[name], MIXED[name]) for name in names)
    assert not (tmp_path / "out" / "pytorch_model.bin.index.json").exists()


def test_an_adapters_file_keeps_the_name_that_peft_looks_for(tmp_path: Path) -> None:
    folder, name = tmp_path / "adapter", "base_model.model.q.lora_A.weight"
    folder.mkdir()
    torch.save({name: MIXED["w"]}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"r": 4}')
    _, got = convert(folder, tmp_path / "out", max_shard=1000)
    assert same(got[name], MIXED["w"])
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "surgery.json",
    ]  # fmt: skip


def test_a_list_among_the_tensors_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "history": [1, 2]}, tmp_path / "x.bin")
    with pytest.raises(FormatError) as error:
        convert(tmp_path / "x.bin", tmp_path / "out")
    assert str(error.value) == (
        f"{tmp_path}/x.bin: history is a list, not a tensor (1 such in all). "
        "Save the state dict alone."
    )
    assert [f.name for f in tmp_path.iterdir()] == ["x.bin"]


# --- dtypes


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("seed", [0, 1])
def test_floats_are_cast_as_torch_casts_them_and_nothing_else_is(
    tmp_path: Path, dtype: str, seed: int
) -> None:
    tensors = {**MIXED, "w": drawn((300, 200), seed=seed)}
    _, got = convert(model(tmp_path / "model", tensors), tmp_path / "out", dtype)
    for name, was in tensors.items():
        cast = was.dtype in TORCH.values()
        assert same(got[name], was.to(TORCH[dtype]) if cast else was), name


def test_without_a_dtype_every_tensor_keeps_its_own(tmp_path: Path) -> None:
    report, got = convert(model(tmp_path / "model", MIXED), tmp_path / "out")
    assert all(same(got[name], was) for name, was in MIXED.items())
    assert report.results == ()
    assert report.total == {"tensors": 0, "relative_error": 0.0}


@pytest.mark.parametrize(
    ("was", "dtype"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32"), ("BF16", "F16")]
)
def test_the_error_of_a_cast_is_the_one_that_torch_finds(
    tmp_path: Path, was: str, dtype: str
) -> None:
    tensors = {"a": drawn((300, 200), TORCH[was]), "b": drawn((40, 50), TORCH[was], 1) * 1e-6}
    report, got = convert(model(tmp_path / "model", tensors), tmp_path / "out", dtype)
    errors = {n: (got[n].double() - w.double()).square().sum().item() for n, w in tensors.items()}
    norms = {n: w.double().square().sum().item() for n, w in tensors.items()}
    for result in report.results:
        want = (errors[result.name] / norms[result.name]) ** 0.5
        # sums of squares in float32
        assert result.metrics["relative_error"] == pytest.approx(want, rel=1e-4)
    want = (sum(errors.values()) / sum(norms.values())) ** 0.5
    assert report.total == {"tensors": 2, "relative_error": pytest.approx(want, rel=1e-4)}


def test_a_cast_to_a_wider_dtype_has_no_error(tmp_path: Path) -> None:
    tensors = {"w": drawn((20, 30), torch.bfloat16)}
    report, _ = convert(model(tmp_path / "model", tensors), tmp_path / "out", "F32")
    assert report.total == {"tensors": 1, "relative_error": 0.0}


@pytest.mark.parametrize("was", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_that_does_not_fit_is_refused_by_name(tmp_path: Path, was: torch.dtype) -> None:
    w = torch.ones(400, 300, dtype=was)
    w[350, 7] = -69632  # exact in bfloat16; float16 ends at 65504
    with pytest.raises(ValueRangeError) as error:
        convert(model(tmp_path / "model", {"a.w": w, "b": torch.ones(2)}), tmp_path / "out", "F16")
    assert str(error.value) == "a.w: 69632 does not fit into F16. Choose another --dtype."
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_nan_and_infinite_weights_stay_what_they_are_and_have_no_error(tmp_path: Path) -> None:
    w = drawn((20, 30))
    w[3, 4], w[5, 6], w[7, 8] = torch.nan, torch.inf, -torch.inf
    report, got = convert(model(tmp_path / "model", {"w": w}), tmp_path / "out", "BF16")
    assert torch.isnan(got["w"][3, 4])
    assert got["w"][5, 6] == torch.inf
    assert got["w"][7, 8] == -torch.inf
    finite = w.isfinite()
    error = (got["w"].double() - w.double())[finite].norm() / w.double()[finite].norm()
    assert report.total["relative_error"] == pytest.approx(error.item(), rel=1e-5)


def test_weights_whose_squares_leave_float32_have_a_true_error(tmp_path: Path) -> None:
    w = drawn((20, 30)) * 1e30
    report, got = convert(model(tmp_path / "model", {"w": w}), tmp_path / "out", "BF16")
    error = (got["w"].double() - w.double()).norm() / w.double().norm()
    assert report.total["relative_error"] == pytest.approx(error.item(), rel=1e-5)


def test_without_an_output_the_numbers_are_the_same_and_nothing_is_written(tmp_path: Path) -> None:
    source = model(tmp_path / "model", MIXED)
    rehearsed = convert_checkpoint(source, None, "BF16", HOW)
    report, _ = convert(source, tmp_path / "out", "BF16")
    assert rehearsed.results == report.results
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "out"]


# --- shards


def test_shards_are_as_large_as_asked_and_the_index_is_true(tmp_path: Path) -> None:
    tensors = {f"l{i}": drawn((10 + i, 100), seed=i) for i in range(9)}
    _, got = convert(model(tmp_path / "model", tensors), tmp_path / "out", max_shard=12_000)
    assert all(same(got[name], was) for name, was in tensors.items())
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    held: dict[str, int] = {}
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(tmp_path / "out" / file, "pt") as opened:
            held[file] = held.get(file, 0) + opened.get_tensor(name).nbytes
    assert sorted(held) == sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert max(held.values()) <= 12_000
    assert len(held) == 6


def test_shards_become_one_file_and_their_index_goes(tmp_path: Path) -> None:
    tensors = {f"l{i}": drawn((10, 100), seed=i) for i in range(5)}
    convert(model(tmp_path / "model", tensors), tmp_path / "shards", max_shard=8_000)
    _, got = convert(tmp_path / "shards", tmp_path / "out")
    assert all(same(got[name], was) for name, was in tensors.items())
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "surgery.json",
    ]


def test_the_library_and_torch_find_the_format_in_the_metadata(tmp_path: Path) -> None:
    convert(model(tmp_path / "model", {"w": drawn((2, 2))}), tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- side files


def test_side_files_travel_and_the_config_says_the_new_dtype(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "torch_dtype": "float32", "text_config": {"dtype": "float32"},
        "quantization": None,
    }  # fmt: skip
    source = model(tmp_path / "model", MIXED, **config)
    kept = {"tokenizer.json": "{1}", "chat_template.jinja": "{{x}}", "sub/code.py": "pass"}
    dropped = (
        "pytorch_model.bin",
        "old.index.json",
        ".hidden",
        "flax_model.msgpack",
        "surgery.json",
    )
    for name in (*kept, *dropped):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(kept.get(name, "{}"))
    convert(source, tmp_path / "out", "BF16")
    out = tmp_path / "out"
    assert sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()) == sorted(
        [*kept, "config.json", "model.safetensors", "surgery.json"]
    )
    assert {name: (out / name).read_text() for name in kept} == kept
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "llama", "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16"},
        "quantization": None,
    }  # fmt: skip


def test_a_lone_file_takes_no_side_files_along(tmp_path: Path) -> None:
    source = model(tmp_path / "model", MIXED, model_type="llama")
    convert(source / "model.safetensors", tmp_path / "out")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "model.safetensors",
        "surgery.json",
    ]


# --- packed weights

F8 = {
    "l.q.weight": drawn((256, 128)).to(torch.float8_e4m3fn),
    "l.q.weight_scale_inv": drawn((2, 1)),
    "l.norm.weight": drawn((128,)),
}
GPTQ = {
    "l.q.qweight": torch.arange(64, dtype=torch.int32).reshape(8, 8), "l.q.scales": drawn((4, 8), torch.float16),
    "l.q.qzeros": torch.zeros(4, 1, dtype=torch.int32), "l.q.g_idx": torch.zeros(64, dtype=torch.int32),
    "l.norm.weight": drawn((128,)),
}  # fmt: skip
INT8 = {
    "l.q.weight": torch.ones(8, 8, dtype=torch.int8), "l.q.SCB": drawn((8,)), "l.norm.weight": drawn((128,)),
}  # fmt: skip
MXFP4 = {
    "l.experts.up_blocks": torch.arange(64, dtype=torch.uint8).reshape(4, 16),
    "l.experts.up_scales": torch.arange(4, dtype=torch.uint8), "l.experts.up_bias": drawn((4,)),
    "l.norm.weight": drawn((128,)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "method", "kept"),
    [
        (F8, {"quant_method": "fp8"}, 2),
        (F8, None, 2),
        (GPTQ, {"quant_method": "gptq"}, 4),
        (INT8, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 2),
        (MXFP4, {"quant_method": "mxfp4"}, 3),
    ],
    ids=["fp8", "fp8 without a config", "gptq", "int8", "mxfp4"],
)
def test_codes_and_their_scales_are_copied_whatever_dtype_is_asked(
    tmp_path: Path, tensors: dict[str, torch.Tensor], method: object, kept: int
) -> None:
    """A scale that is rounded to bfloat16 would move every weight of its block."""
    source = model(tmp_path / "model", tensors, dtype="float32", quantization_config=method)
    report, got = convert(source, tmp_path / "out", "BF16")
    for name, was in tensors.items():
        assert same(got[name], was.bfloat16() if name == "l.norm.weight" else was), name
    assert report.notes == (
        f"{kept} tensors of quantized weights are copied as they are, not cast to BF16",
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"] == method
    )


def test_integers_beside_floats_of_a_plain_model_do_not_stop_a_cast(tmp_path: Path) -> None:
    norm = {"bn.weight": drawn((8,)), "bn.num_batches_tracked": torch.tensor(7)}
    report, got = convert(model(tmp_path / "model", norm), tmp_path / "out", "BF16")
    assert same(got["bn.weight"], norm["bn.weight"].bfloat16())
    assert same(got["bn.num_batches_tracked"], torch.tensor(7))
    assert report.notes == ()


def test_bits_below_a_byte_are_copied_and_cast_nothing_by_their_presence(tmp_path: Path) -> None:
    packed = torch.arange(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    source = model(tmp_path / "model", {"l.w": packed, "l.scale": drawn((2,)), "norm": drawn((4,))})
    report, _ = convert(source, tmp_path / "out")
    was, now = (
        dict(safetensors.deserialize((f / "model.safetensors").read_bytes()))
        for f in (source, tmp_path / "out")
    )
    assert now == was
    assert now["l.w"]["dtype"] == "F4"
    assert report.results == ()


# --- NF4


NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
     0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
     0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip


def nf4(folder: Path) -> tuple[Path, dict[str, torch.Tensor], np.ndarray]:
    """A packed model as transformers stores it, its tensors, and the weight it stands for."""
    rng, shape, block = np.random.default_rng(0), (130, 77), 64
    n = shape[0] * shape[1]
    codes, absmax = rng.integers(0, 16, n, np.uint8), rng.random(-(-n // block), np.float32)
    facts = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": shape}
    tensors = {
        "q.weight": torch.from_numpy((codes[::2] << 4 | codes[1::2])[:, None].copy()),
        "q.weight.absmax": torch.from_numpy(absmax),
        "q.weight.quant_map": torch.from_numpy(NF4),
        "q.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        "q.bias": drawn((130,), torch.float16),
        "norm.weight": drawn((77,)),
    }  # fmt: skip
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model(folder, tensors, dtype="float32", quantization_config=quantization)
    return folder, tensors, (NF4[codes] * absmax[np.arange(n) // block]).reshape(shape)


def test_the_parts_of_an_nf4_weight_are_not_cast_and_what_is_beside_it_is(tmp_path: Path) -> None:
    source, tensors, _ = nf4(tmp_path / "model")
    report, got = convert(source, tmp_path / "out", "BF16")
    for name, was in tensors.items():
        cast = name in ("q.bias", "norm.weight")
        assert same(got[name], was.bfloat16() if cast else was), name
    assert len(report.notes) == 1


@pytest.mark.parametrize("dtype", [None, "F32", "F16", "BF16"])
def test_dequantized_weights_are_their_codes_times_their_scales(
    tmp_path: Path, dtype: str | None
) -> None:
    source, tensors, weight = nf4(tmp_path / "model")
    report = dequantize(source, tmp_path / "out", dtype, HOW)
    got = loaded(tmp_path / "out")
    assert sorted(got) == ["norm.weight", "q.bias", "q.weight"]
    kind = TORCH[dtype or "BF16"]
    if kind == torch.bfloat16:
        weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert same(got["q.weight"], torch.from_numpy(weight).to(kind))
    for name in ("norm.weight", "q.bias"):
        assert same(got[name], tensors[name].to(kind) if dtype else tensors[name])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    names = {None: "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    assert config == {"dtype": names[dtype]}
    assert report.total == {"tensors": 1}


def test_dequantize_of_a_plain_model_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "model", {"w": drawn((2, 2))})
    with pytest.raises(FormatError) as error:
        dequantize(source, tmp_path / "out", None, HOW)
    assert str(error.value) == f"{source}: no quantized weight in it. Nothing is to be done."
