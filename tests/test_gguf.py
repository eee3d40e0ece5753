"""GGUF reading: headers that lie, block types against gguf's decoder, row orders, side files."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.errors import FormatError
from lorasurgery.formats import gguf
from lorasurgery.formats._gguf_header import TYPES

HEADS, KV_HEADS, HEAD_DIM, FF = 3, 1, 8, 40
HIDDEN = HEADS * HEAD_DIM


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def row(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return head + struct.pack("<IQ", kind, offset)


def raw(pairs: list[bytes], rows: list[bytes], data: bytes = bytes(64), version: int = 3) -> bytes:
    """A GGUF file from its parts, so that each of them can lie."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(rows), len(pairs))
    header += b"".join(pairs) + b"".join(rows)
    return header + bytes(-len(header) % 32) + data


LLAMA = pair("general.architecture", 8, text("llama"))
EIGHT = row("w", (8,), 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds less than a GGUF header"),
        (b"PK\x03\x04" + bytes(40), "starts with b'PK"),
        (b"GGUF\x03", "needs 4 bytes at byte 4, but the file ends at 5"),
        (raw([], [EIGHT], version=1), "GGUF version 1; 2 and 3, little-endian, are read"),
        (raw([], [EIGHT], version=0x03000000), "GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), f"claims {2**60} tensors and 0 values in 24"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), f"claims 0 tensors and {2**63} values"),
        (raw([LLAMA, LLAMA], [EIGHT]), "the key 'general.architecture' stands in it twice"),
        (raw([LLAMA], [EIGHT, EIGHT]), "w stands in it twice"),
        (raw([struct.pack("<Q", 2**63)], []), f"header: needs {2**63} bytes at byte 32"),
        (raw([pair("k", 8, struct.pack("<Q", 1000))], []), "k: needs 1000 bytes"),
        (raw([pair("k", 8, struct.pack("<Q", 1) + b"\xff")], []), "byte 45 is not UTF-8"),
        (raw([pair("k", 13, b"")], []), "k: holds a value of unknown type 13"),
        (raw([pair("k", 9, struct.pack("<IQ", 9, 1))], []), "k: holds an array of type 9"),
        (raw([pair("k", 9, struct.pack("<IQ", 8, 2**61))], []), f"k: needs {2**64} bytes"),
        (raw([pair("k", 9, struct.pack("<IQ", 5, 2**62))], []), f"k: needs {2**64} bytes"),
        (
            raw([pair("k", 9, struct.pack("<IQQQ", 8, 2, 2**63, 0))], [], bytes(999)),
            f"k: needs {2**63 + 16} bytes at byte 49",
        ),
        (raw([pair("general.alignment", 4, struct.pack("<I", 0))], [EIGHT]), "alignment is 0, not"),
        (raw([pair("general.alignment", 4, struct.pack("<I", 24))], [EIGHT]), "is 24, not a power"),
        (raw([pair("general.alignment", 8, text("x"))], [EIGHT]), "general.alignment is x, not"),
        (raw([], [row("w", (1,) * 5, 0, 0)]), "w has 5 dimensions, at most 4 are allowed"),
        (raw([], [row("w", (8,), 99, 0)]), "w is of unknown type 99"),
        (raw([], [row("w", (8,), 4, 0)]), "w is of unknown type 4"),
        (raw([], [row("w", (33, 2), 8, 0)]), "w: Q8_0 [2, 33] is impossible: rows come in blocks"),
        (raw([], [row("w", (0, 2), 0, 0)]), "w: F32 [2, 0] is impossible"),
        (raw([], [row("w", (2**40, 2**40), 0, 0)]), "is impossible"),
        (
            raw([], [row("w", (8,), 0, 8)]),
            "w starts at byte 8 of the data, not at a multiple of 32",
        ),
        (
            raw([], [EIGHT, row("v", (8,), 0, 0)]),
            "v starts at byte 96 and overlaps w, which ends at",
        ),
        (raw([], [row("w", (8,), 0, 64)]), "w ends at byte 160, but the file at 128. It is cut"),
        (raw([], [EIGHT], bytes(31)), "w ends at byte 96, but the file at 95"),
        (raw([pair("split.count", 2, struct.pack("<H", 3))], [EIGHT]), "is one part of 3. Join"),
    ],
)
def test_a_header_that_lies_is_refused_in_one_line(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError) as error:
        open_checkpoint(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_opens_or_is_refused_but_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    numbers = pair("a", 9, struct.pack("<IQ2i", 5, 2, 1, 2))
    strings = pair("t", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yz"))
    whole = bytearray(raw([LLAMA, numbers, strings], [EIGHT, row("v", (2, 4), 1, 32)]))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    try:
        file = gguf.open(path)
        for name in file:
            assert file.read(name).shape == file.info(name).shape
        file.array("t")
    except FormatError as error:
        assert str(error).startswith(str(path))


def test_the_table_of_block_types_is_ggufs_own() -> None:
    for number, (name, block, size) in TYPES.items():
        assert Kind(number).name == name
        assert peer.GGML_QUANT_SIZES[Kind(number)] == (block, size)


def test_opening_imports_neither_numpy_nor_gguf(tmp_path: Path) -> None:
    path = tmp_path / "w.gguf"
    path.write_bytes(raw([LLAMA], [EIGHT]))
    script = (
        "import sys; from pathlib import Path; from lorasurgery.checkpoint import open_checkpoint;"
        "file = open_checkpoint(Path(sys.argv[1])); print([str(file.info(n)) for n in file]);"
        "assert not {'numpy', 'gguf', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "['w  F32 [8]']\n"), done.stderr


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray], **values: object) -> Path:
    """A file by gguf's own writer; `values` are keys of the architecture, `_` for `.`-less ones."""
    writer = peer.GGUFWriter(path, architecture)
    for key, value in values.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        if isinstance(value, float):
            writer.add_float32(name, value)
        else:
            assert isinstance(value, int)
            writer.add_uint32(name, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def blocks(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Random valid bytes of a type; its float16 scales are made small and finite."""
    rng = np.random.default_rng(int(kind))
    block, size = peer.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, columns // block, size), np.uint8)
    scales = {  # where the float16 scales of a block lie
        Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2),
        Kind.Q6_K: (208,), Kind.Q4_1: (0, 2), Kind.Q5_1: (0, 2),
    }.get(kind, (0,))  # fmt: skip
    for at in scales:
        scale = rng.normal(size=data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scale[..., None].view(np.uint8)
    return data.reshape(rows, -1)


QUANTIZED = [
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
]  # fmt: skip


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_blocks_decode_to_what_gguf_decodes_them_to(tmp_path: Path, kind: Kind) -> None:
    data = blocks(kind, rows=6, columns=512)
    writer = peer.GGUFWriter(tmp_path / "w.gguf", "none")
    writer.add_tensor("w", data, raw_dtype=kind)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    file = open_checkpoint(tmp_path / "w.gguf")
    expected = peer.dequantize(data, kind)
    assert np.isfinite(expected).all()
    assert np.unique(expected).size > 30  # the bytes say something
    assert str(file.info("w")) == "w  F32 [6, 512]"
    assert file.storage("w") == (kind.name, data.nbytes)
    assert file.place("w") is None
    np.testing.assert_array_equal(file.read("w"), expected)
    np.testing.assert_array_equal(file.read("w", 2, 5), expected[2:5])


def test_a_tensor_larger_than_a_chunk_decodes_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = np.random.default_rng(0).normal(size=(37, 64)).astype(np.float32)
    data = peer.quantize(w, Kind.Q8_0)
    writer = peer.GGUFWriter(tmp_path / "w.gguf", "none")
    writer.add_tensor("w", data, raw_dtype=Kind.Q8_0)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    monkeypatch.setattr(gguf, "CHUNK", 7 * 32)
    read = open_checkpoint(tmp_path / "w.gguf").read("w")
    np.testing.assert_array_equal(read, peer.dequantize(data, Kind.Q8_0))


def weights() -> dict[str, np.ndarray]:
    """One layer of a Llama whose every row holds its own number."""
    shapes = {
        "token_embd.weight": (50, HIDDEN), "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,), "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN), "blk.0.attn_q.bias": (HIDDEN,),
        "blk.0.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN), "blk.0.ffn_gate.weight": (FF, HIDDEN),
        "blk.0.ffn_up.weight": (FF, HIDDEN), "blk.0.ffn_down.weight": (HIDDEN, FF),
    }  # fmt: skip
    return {
        name: np.ones(shape, np.float32) * np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        for name, shape in shapes.items()
    }


SIZES = {
    "block_count": 1, "context_length": 128, "embedding_length": HIDDEN, "feed_forward_length": FF,
    "attention__head_count": HEADS, "attention__head_count_kv": KV_HEADS,
    "attention__layer_norm_rms_epsilon": 1e-5, "rope__freq_base": 5e5, "vocab_size": 50,
}  # fmt: skip


def test_llama_q_and_k_rows_come_in_halves_where_the_file_has_pairs(tmp_path: Path) -> None:
    file = gguf.open(write(tmp_path / "m.gguf", "llama", weights(), **SIZES))
    prefix = "model.layers.0.self_attn."
    head = np.array([0, 2, 4, 6, 1, 3, 5, 7], np.float32)
    whole = np.concatenate([head, head + 8, head + 16])
    np.testing.assert_array_equal(file.read(prefix + "q_proj.weight")[:, 0], whole)
    np.testing.assert_array_equal(file.read(prefix + "q_proj.weight", 5, 11)[:, 3], whole[5:11])
    np.testing.assert_array_equal(file.read(prefix + "q_proj.bias"), whole)
    np.testing.assert_array_equal(file.read(prefix + "k_proj.weight")[:, 0], head)
    np.testing.assert_array_equal(file.read(prefix + "v_proj.weight")[:, 0], np.arange(8))
    assert file.place(prefix + "q_proj.weight") is None


def test_qwen2_keeps_the_row_order_of_the_file(tmp_path: Path) -> None:
    file = gguf.open(write(tmp_path / "m.gguf", "qwen2", weights(), **SIZES))
    read = file.read("model.layers.0.self_attn.q_proj.weight")
    np.testing.assert_array_equal(read[:, 0], np.arange(HIDDEN))


def test_a_place_holds_exactly_the_bytes_that_are_read(tmp_path: Path) -> None:
    tensors = weights() | {
        "blk.0.ffn_up.weight": weights()["blk.0.ffn_up.weight"].astype(np.float16)
    }
    file = gguf.open(write(tmp_path / "m.gguf", "llama", tensors, **SIZES))
    placed = [name for name in file if file.place(name)]
    assert len(placed) == len(file) - 3  # all but q, its bias and k
    for name in placed:
        path, offset = file.place(name) or (Path(), 0)
        there = path.read_bytes()[offset : offset + file.info(name).nbytes]
        assert there == file.read(name).tobytes()
    assert file.info("model.layers.0.mlp.up_proj.weight").dtype == "F16"


def test_releasing_a_tensor_leaves_it_readable(tmp_path: Path) -> None:
    file = gguf.open(write(tmp_path / "m.gguf", "llama", weights(), **SIZES))
    for name in file:
        before = file.read(name).tobytes()
        file.release(name)
        assert file.read(name).tobytes() == before


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", weights(), **SIZES)
    file = gguf.open(path)
    size = path.stat().st_size
    with path.open("r+b") as handle:
        handle.truncate(200)
    with pytest.raises(FormatError, match=rf"shrank from {size} to 200 bytes while it was read"):
        file.read("model.embed_tokens.weight")


def test_heads_that_do_not_divide_the_rows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", weights(), **SIZES | {"attention__head_count": 5})
    with pytest.raises(FormatError, match=r"attn_q.weight: 24 rows are not 5 heads of an even"):
        gguf.open(path)


def test_an_unknown_architecture_keeps_its_names_and_says_so(tmp_path: Path) -> None:
    file = gguf.open(write(tmp_path / "m.gguf", "mamba", weights(), **SIZES))
    assert set(file) == set(weights())
    assert file.family is None
    assert gguf.side_files(file) == {}
    assert gguf.remarks(file) == [
        f"{file.path}: config.json is not written: architecture 'mamba' is not mapped to "
        "transformers. Add it by hand.",
        f"{file.path}: tokenizer.json is not written: a vocabulary of kind None is not read. Take "
        "the file from the original model.",
    ]


def test_a_mixture_of_experts_is_not_taken_for_a_dense_llama(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama", weights(), **SIZES, expert_count=8)
    assert gguf.open(path).family is None


def test_a_tensor_without_a_name_in_transformers_is_kept_and_remarked(tmp_path: Path) -> None:
    tensors = weights() | {"blk.0.attn_sinks.weight": np.zeros(3, np.float32)}
    file = gguf.open(write(tmp_path / "m.gguf", "llama", tensors, **SIZES))
    assert "blk.0.attn_sinks.weight" in file
    assert any("blk.0.attn_sinks.weight (1 in all)" in remark for remark in gguf.remarks(file))


def config_of(path: Path) -> dict[str, object]:
    config: dict[str, object] = json.loads(gguf.side_files(gguf.open(path))["config.json"])
    return config


def test_the_config_says_what_the_header_and_the_weights_say(tmp_path: Path) -> None:
    config = config_of(write(tmp_path / "m.gguf", "llama", weights(), **SIZES))
    assert config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50,
        "hidden_size": HIDDEN, "intermediate_size": FF, "num_hidden_layers": 1,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": None, "attention_bias": True, "mlp_bias": False,
        "rope_theta": 5e5,
    }  # fmt: skip


def test_an_output_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    tensors = weights() | {"output.weight": np.zeros((50, HIDDEN), np.float32)}
    path = write(tmp_path / "m.gguf", "llama", tensors, **SIZES)
    assert config_of(path)["tie_word_embeddings"] is False
    assert "lm_head.weight" in gguf.open(path)


@pytest.mark.parametrize("missing", ["block_count", "attention__head_count", "context_length"])
def test_a_header_without_a_size_gives_no_config_and_a_reason(tmp_path: Path, missing: str) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != missing}
    file = gguf.open(write(tmp_path / "m.gguf", "qwen2", weights(), **sizes))
    assert "config.json" not in gguf.side_files(file)
    reason = f"config.json is not written: qwen2.{missing.replace('__', '.')} is missing."
    assert any(reason in remark for remark in gguf.remarks(file))


def llama3_divisors(factor: float) -> np.ndarray:
    """Llama 3.1's rule for theta 5e5 and heads of 8, step by step as its paper's code states it."""
    divisors = []
    for frequency in [5e5 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]:
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def test_llama_3_rope_divisors_become_rope_scaling(tmp_path: Path) -> None:
    tensors = weights() | {"rope_freqs.weight": llama3_divisors(32.0)}
    path = write(tmp_path / "m.gguf", "llama", tensors, **SIZES)
    assert config_of(path)["rope_scaling"] == {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert "rope_freqs.weight" not in gguf.open(path)


def test_rope_divisors_of_another_rule_are_remarked(tmp_path: Path) -> None:
    tensors = weights() | {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}
    file = gguf.open(write(tmp_path / "m.gguf", "llama", tensors, **SIZES))
    assert b"rope_scaling" not in gguf.side_files(file)["config.json"]
    assert any("rope scaling of the header is not expressed" in r for r in gguf.remarks(file))


def test_an_unknown_pre_tokenizer_gives_no_tokenizer_and_a_reason(tmp_path: Path) -> None:
    writer = peer.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("never-heard-of")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    file = gguf.open(tmp_path / "m.gguf")
    assert "tokenizer.json" not in gguf.side_files(file)
    assert any("pre-tokenizer 'never-heard-of' is not known" in r for r in gguf.remarks(file))
