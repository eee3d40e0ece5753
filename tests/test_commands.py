"""quantize, dequantize and convert-checkpoint as typed, on made models whose results are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from lorasurgery.cli.app import app

Tensors = dict[str, np.ndarray]


def cli(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, in this process."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="lorasurgery")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def facts(*arguments: object) -> dict[str, Any]:
    code, stdout, stderr = cli(*arguments, "--json")
    assert code == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def on_the_grid(rows: int, columns: int, seed: int) -> np.ndarray:
    """Blocks of 64 of -s, 0 and s, s a power of two: NF4 has codes for just these."""
    rng = np.random.default_rng(seed)
    signs = rng.integers(-1, 2, (rows * columns // 64, 64)).astype(np.float32)
    signs[:, 0] = 1
    scales = 2.0 ** rng.integers(-6, 3, (len(signs), 1))
    return (signs * scales).astype(np.float32).reshape(rows, columns)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two layers whose linear weights NF4 holds exactly, an embedding and a norm, in bfloat16."""
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {"model.embed_tokens.weight": np.arange(96, dtype=np.float32).reshape(6, 16)}
    for i in range(2):
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = on_the_grid(24, 16, i)
        tensors[f"model.layers.{i}.mlp.down_proj.weight"] = on_the_grid(16, 24, 9 + i)
        tensors[f"model.layers.{i}.norm.weight"] = np.full(16, 1.5, np.float32)
    save_file(
        {name: data.astype(ml_dtypes.bfloat16) for name, data in tensors.items()},
        folder / "model.safetensors",
    )
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def test_quantize_reports_errors_and_bits_by_layer(base: Path, tmp_path: Path) -> None:
    code, stdout, stderr = cli("quantize", base, "-o", tmp_path / "out", "--no-double-quant")
    assert (code, stderr) == (0, "")
    *lines, last = stdout.splitlines()
    # 192 bytes of codes, 6 scales, a table of 16 and the JSON for 384 weights
    state = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [24, 16]}'
    bits = 8 * (192 + 24 + 64 + len(state)) / 384
    whole = (4 * bits * 384 + 16 * (96 + 32)) / (4 * 384 + 96 + 32)
    numbers = f"             0 %          0         768               {bits:.3f}"
    assert lines == [
        "tensor                                        relative error  max error  parameters  bits per parameter",
        f"model.layers.{{0..1}}.mlp.down_proj.weight  x2{numbers}",
        f"model.layers.{{0..1}}.mlp.up_proj.weight    x2{numbers}",
        "",
        "tensors                       4",
        "relative error                0 %",
        "max error                     0",
        "parameters                    1.664 K",
        "quantized parameters          1.536 K",
        f"bits per quantized parameter  {bits:.3f}",
        f"bits per parameter            {whole:.3f}",
        f"size                          {whole * 1664 / 8 / 1024:.2f} KiB",
    ]
    assert last.startswith(f"wrote {tmp_path}/out in ")


def test_what_nf4_holds_exactly_comes_back_byte_for_byte(base: Path, tmp_path: Path) -> None:
    cli("quantize", base, "-o", tmp_path / "nf4", "--no-double-quant")
    code, stdout, _ = cli("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain")
    assert code == 0
    assert stdout.splitlines()[:3] == [
        "tensor                                        parameters",
        "model.layers.{0..1}.mlp.down_proj.weight  x2         768",
        "model.layers.{0..1}.mlp.up_proj.weight    x2         768",
    ]
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "plain"))
    assert before.keys() == after.keys()
    for name, w in before.items():
        assert (after[name].dtype, after[name].tobytes()) == (w.dtype, w.tobytes()), name
    configs = [json.loads((d / "config.json").read_text()) for d in (base, tmp_path / "plain")]
    assert configs[0] == configs[1]


def test_dequantize_writes_the_dtype_that_is_asked_for(base: Path, tmp_path: Path) -> None:
    cli("quantize", base, "-o", tmp_path / "nf4", "--no-double-quant")
    cli("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain", "--dtype", "float32")
    found = load_file(tmp_path / "plain" / "model.safetensors")
    assert {w.dtype for w in found.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(
        found["model.layers.1.mlp.up_proj.weight"], on_the_grid(24, 16, 1)
    )
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "float32"


def test_a_quantized_directory_is_what_transformers_expects(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("quantize", base, "-o", out, "--block-size", "128", "--max-shard-size", "1KB")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "bitsandbytes"
    assert quantization["bnb_4bit_quant_type"] == "nf4"
    assert quantization["bnb_4bit_use_double_quant"] is True
    assert quantization["llm_int8_skip_modules"] == ["lm_head", "model.embed_tokens"]
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    stored = {name: data for file in files for name, data in load_file(out / file).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert sum(data.nbytes for data in stored.values()) == index["metadata"]["total_size"]
    state = bytes(stored["model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"])
    assert json.loads(state)["blocksize"] == 128


def test_a_dry_run_has_the_numbers_of_the_run(base: Path, tmp_path: Path) -> None:
    rehearsed = facts("quantize", base, "--dry-run")
    done = facts("quantize", base, "-o", tmp_path / "out")
    assert rehearsed["output"] is None
    assert rehearsed["tensors"] == done["tensors"]
    assert rehearsed["total"] == done["total"]
    assert set(done["tensors"]) == {
        f"model.layers.{i}.mlp.{x}_proj.weight" for i in (0, 1) for x in ("up", "down")
    }


def test_include_and_exclude_choose_tensors(base: Path, tmp_path: Path) -> None:
    found = facts(
        "quantize", base, "-o", tmp_path / "out", "--include", "*.mlp.*", "--include", "*embed*",
        "--exclude", "*layers.1.*",
    )  # fmt: skip
    assert sorted(found["tensors"]) == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    settings = json.loads((tmp_path / "out" / "surgery.json").read_text())["settings"]
    assert settings["include"] == ["*.mlp.*", "*embed*"]
    assert settings["exclude"] == ["*layers.1.*"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--block-size", "48"),
            "model.layers.0.mlp.down_proj.weight: block size 48 is not one of 32, 64, 128, 256, "
            "512, 1024, 2048, 4096. Pass one of them as --block-size.",
        ),
        (
            ("--exclude", "*attn*"),
            "{base}: no tensor matches '*attn*'. See `lorasurgery inspect`.",
        ),
        (
            ("--include", "*norm*"),
            "{base}: none of its 7 tensors is a linear weight. Name some with --include.",
        ),
    ],
)
def test_what_cannot_be_quantized_is_one_line_and_leaves_nothing(
    base: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, stdout, stderr = cli("quantize", base, "-o", tmp_path / "out", *arguments)
    assert (code, stdout, stderr) == (1, "", f"error: {message.format(base=base)}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_quantized_model_is_not_quantized_twice(base: Path, tmp_path: Path) -> None:
    cli("quantize", base, "-o", tmp_path / "nf4")
    code, _, stderr = cli("quantize", tmp_path / "nf4", "-o", tmp_path / "out")
    assert (code, stderr) == (
        1,
        f"error: {tmp_path}/nf4: model.layers.0.mlp.down_proj.weight is nf4 already. Run "
        "`lorasurgery dequantize` first.\n",
    )


def test_a_plain_model_is_not_dequantized(base: Path, tmp_path: Path) -> None:
    assert cli("dequantize", base, "-o", tmp_path / "out") == (
        1, "", f"error: {base}: no quantized weight in it. Nothing is to be done.\n",
    )  # fmt: skip


# ---- convert-checkpoint


def test_a_bin_file_becomes_safetensors_byte_for_byte(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {
        "a.weight": torch.randn(5, 7).to(torch.bfloat16), "a.bias": torch.randn(5),
        "steps": torch.tensor(3), "b.weight": torch.randn(7, 5).T,
    }  # fmt: skip
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "config.json").write_text('{"model_type": "x"}')
    assert cli("convert-checkpoint", source, "-o", tmp_path / "out", "-q") == (0, "", "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, w in tensors.items():
        assert found[name].shape == tuple(w.shape)
        assert (
            found[name].tobytes() == w.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "surgery.json",
    ]  # fmt: skip


def test_sharded_bin_files_become_one_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weight_map = {}
    for i in (1, 2):
        file = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({f"w.{i}": torch.full((3, 4), float(i))}, source / file)
        weight_map[f"w.{i}"] = file
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert cli("convert-checkpoint", source, "-o", tmp_path / "out", "-q") == (0, "", "")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: float(w.mean()) for name, w in found.items()} == {"w.1": 1.0, "w.2": 2.0}


@pytest.fixture
def model_gguf(tmp_path: Path) -> tuple[Path, Tensors]:
    """A Llama of one layer in Q8_0, and what its weights decode to by gguf itself."""
    path, rng, decoded = tmp_path / "m.gguf", np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, "llama")
    sizes = {
        "block_count": 1, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
        "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": 10,
    }  # fmt: skip
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    kind = gguf.GGMLQuantizationType.Q8_0
    for theirs, ours, rows in (
        ("token_embd.weight", "model.embed_tokens.weight", 10),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", 96),
    ):
        data = gguf.quantize(rng.normal(size=(rows, 64)).astype(np.float32), kind)
        writer.add_tensor(theirs, data, raw_dtype=kind)
        decoded[ours] = gguf.dequantize(data, kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return path, decoded


def test_a_gguf_file_becomes_bfloat16_with_a_config(
    model_gguf: tuple[Path, Tensors], tmp_path: Path
) -> None:
    path, decoded = model_gguf
    code, _, stderr = cli("convert-checkpoint", path, "-o", tmp_path / "out")
    assert code == 0
    assert stderr == (
        f"note: {path}: tokenizer.json is not written: a vocabulary of kind None is not read. Take "
        "the file from the original model.\n"
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in decoded.items():
        wanted = torch.from_numpy(w).to(torch.bfloat16).view(torch.uint16).numpy()
        assert found[name].tobytes() == wanted.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"


def test_a_gguf_file_in_float32_holds_what_gguf_decodes(
    model_gguf: tuple[Path, Tensors], tmp_path: Path
) -> None:
    path, decoded = model_gguf
    found = facts("convert-checkpoint", path, "-o", tmp_path / "out", "--dtype", "float32")
    assert found["notes"] == [
        f"{path}: tokenizer.json is not written: a vocabulary of kind None is not read. Take the "
        "file from the original model."
    ]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, w in decoded.items():
        np.testing.assert_array_equal(stored[name], w)
