"""GGUF against transformers' own reader: every tensor, every token, every logit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorasurgery.formats import gguf

TEXTS = [
    "Hello world", "", " ", "   leading and trailing   ", "a\n\n\n  b\t\tc\r\nd",
    "don't I'LL we've",
    "I have 12345 apples, 3.14159 pies and 1,000,000 crumbs", "x=1;y=[2]; z = {'k': 3}",
    "naïve café — e\u0301 ﬁ Å", "漢字かな交じり文 한국어 עברית", "😀👩‍👩‍👧",
    "\u00a0nbsp\u2003em\u200bzero", "１２３ abc½Ⅷ",
    "def f(x):\n    return x ** 2  # ok\n\n\nclass A:\n\tpass", "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|><|im_end|>a<|im_start|>", "http://a.b/c?d=e&f=%20#g", "!!!???...---", "ÀÉÎõü ß ſ",
]  # fmt: skip


def directory(path: Path, out: Path) -> Path:
    """The converted model: weights by our reader, side files, and nothing of GGUF."""
    file = gguf.open(path)
    out.mkdir()
    for name, content in gguf.side_files(file).items():
        (out / name).write_bytes(content)
    save_file({name: file.read(name) for name in file}, out / "model.safetensors", {"format": "pt"})
    assert gguf.remarks(file) == []
    return out


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(smollm2, tmp_path_factory.mktemp("smollm2") / "model")


def equal_models(theirs: PreTrainedModel, path: Path, ids: list[int]) -> None:
    """The directory loads without a missing weight, and gives the same logits bit for bit."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    ours, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert ours.config.tie_word_embeddings == theirs.config.tie_word_embeddings
    with torch.inference_mode():
        batch = torch.tensor([ids])
        torch.testing.assert_close(ours(batch).logits, theirs(batch).logits, rtol=0, atol=0)


def test_every_tensor_of_smollm2_equals_transformers_bit_for_bit(
    smollm2: Path, smollm2_by_transformers: PreTrainedModel
) -> None:
    file = gguf.open(smollm2)
    theirs = dict(smollm2_by_transformers.named_parameters())
    assert set(file) == set(theirs)
    for name in file:
        assert file.read(name).tobytes() == theirs[name].detach().numpy().tobytes(), name


def test_smollm2_converted_has_the_logits_of_the_gguf(
    converted: Path, smollm2_by_transformers: PreTrainedModel
) -> None:
    equal_models(smollm2_by_transformers, converted, list(range(100, 164)))


def test_smollm2_converted_has_the_config_of_the_gguf(
    converted: Path, smollm2_by_transformers: PreTrainedModel
) -> None:
    ours = AutoModelForCausalLM.from_pretrained(converted, device_map="meta").config.to_dict()
    theirs = smollm2_by_transformers.config.to_dict()
    # where it lies; a float32 written out; what transformers leaves to the tokenizer elsewhere
    apart = {
        "_name_or_path",
        "_model_name_or_path",
        "architectures",
        "rms_norm_eps",
        "unk_token_id",
        "quantization_config",
    }
    assert {k: v for k, v in ours.items() if k not in apart} == {
        k: v for k, v in theirs.items() if k not in apart
    }
    assert np.float32(ours["rms_norm_eps"]) == np.float32(theirs["rms_norm_eps"])


def test_smollm2_converted_gives_the_token_ids_of_the_gguf(converted: Path, smollm2: Path) -> None:
    ours = AutoTokenizer.from_pretrained(converted)
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.all_special_ids == theirs.all_special_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes? 7"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)


def test_smollm2_splits_digits_first_where_transformers_gguf_reader_does_not(
    converted: Path,
) -> None:
    # the model's own tokenizer cuts digits out first, so that two spaces before one are one token;
    # transformers leaves that step out when it reads a GGUF
    ours = AutoTokenizer.from_pretrained(converted)
    assert ours.convert_ids_to_tokens(ours("a  12")["input_ids"]) == ["a", "ĠĠ", "1", "2"]


VOCAB, HEADS, KV_HEADS, FF, LAYERS = 300, 8, 2, 256, 2
HIDDEN = 256
# wider than hidden / heads where the family allows it; transformers reads any qwen3 GGUF as 128
HEAD_DIM = {"llama": 64, "qwen3": 128, "qwen2": HIDDEN // HEADS, "phi3": HIDDEN // HEADS}


def tiny(path: Path, architecture: str, kind: Kind) -> Path:
    """A random model of a family, its projections stored as `kind`."""
    rng = np.random.default_rng(1)
    head_dim = HEAD_DIM[architecture]
    writer = peer.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_vocab_size(VOCAB)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    for name, shape in shapes(architecture, head_dim).items():
        w = rng.normal(size=shape).astype(np.float32) * 0.05
        w = w + 1 if "norm" in name else w
        if len(shape) == 1:
            writer.add_tensor(name, w)
        else:
            writer.add_tensor(name, stored(w, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def stored(w: np.ndarray, kind: Kind, rng: np.random.Generator) -> np.ndarray:
    """gguf's own quantizer, or random blocks with small scales for the types that it only reads."""
    if kind not in (Kind.Q4_K, Kind.Q6_K):
        return peer.quantize(w, kind)
    block, size = peer.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (w.shape[0], w.shape[1] // block, size), np.uint8)
    for at in (0, 2) if kind is Kind.Q4_K else (208,):
        scale = rng.uniform(-1, 1, data.shape[:2]) * 1e-4
        data[..., at : at + 2] = scale.astype(np.float16)[..., None].view(np.uint8)
    return data.reshape(w.shape[0], -1)


def shapes(architecture: str, head_dim: int) -> dict[str, tuple[int, ...]]:
    q, kv = HEADS * head_dim, KV_HEADS * head_dim
    whole: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,),
        "output.weight": (VOCAB, HIDDEN),
    }  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        "attn_output.weight": (HIDDEN, q), "ffn_down.weight": (HIDDEN, FF),
    }  # fmt: skip
    if architecture == "phi3":
        layer |= {"attn_qkv.weight": (q + 2 * kv, HIDDEN), "ffn_up.weight": (2 * FF, HIDDEN)}
    else:
        layer |= {
            "attn_q.weight": (q, HIDDEN), "attn_k.weight": (kv, HIDDEN),
            "attn_v.weight": (kv, HIDDEN), "ffn_gate.weight": (FF, HIDDEN),
            "ffn_up.weight": (FF, HIDDEN),
        }  # fmt: skip
    if architecture == "qwen2":
        layer |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        del whole["output.weight"]
    if architecture == "qwen3":
        layer |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
    return whole | {f"blk.{i}.{name}": s for i in range(LAYERS) for name, s in layer.items()}


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", Kind.F16), ("llama", Kind.BF16), ("llama", Kind.Q4_K), ("llama", Kind.Q6_K),
        ("qwen2", Kind.Q8_0), ("qwen3", Kind.Q5_1), ("phi3", Kind.Q4_0),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_a_tiny_model_of_each_family_converts_to_the_logits_of_the_gguf(
    tmp_path: Path,
    load_gguf: Callable[[Path], PreTrainedModel],
    architecture: str,
    kind: Kind,
) -> None:
    path = tiny(tmp_path / "tiny.gguf", architecture, kind)
    file = gguf.open(path)
    out = tmp_path / "model"
    out.mkdir()
    (out / "config.json").write_bytes(gguf.side_files(file)["config.json"])
    read = {name: file.read(name).astype(np.float32) for name in file}
    save_file(read, out / "model.safetensors", {"format": "pt"})
    equal_models(load_gguf(path), out, [1, 5, 299, 17, 17, 200, 33])


def byte_symbols() -> list[str]:
    """The 256 symbols of a byte-level vocabulary, printable bytes first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(len(others))]


MERGES = [
    "Ġ t", "h e", "Ġt he", "Ġ a", "1 2", "12 3", "Ġ Ġ", "ĠĠ ĠĠ", "l l", "' ll", "Ċ Ċ", "e r", "Ġ 1",
    "H e", "He ll", "Hell o", "w o", "wo r", "= [", ". .", "Ã ¯", "Ä ±",
]  # fmt: skip


def tokenizer_only(path: Path, architecture: str) -> peer.GGUFWriter:
    writer = peer.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(512)
    return writer


def finish(writer: peer.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("architecture", "pre"),
    [("llama", "default"), ("qwen2", "qwen2"), ("llama", "llama-bpe"), ("llama", "tekken"),
     ("phi3", "gpt-4o")],
)  # fmt: skip
def test_a_byte_level_vocabulary_gives_the_token_ids_of_the_gguf(
    tmp_path: Path, architecture: str, pre: str
) -> None:
    tokens = [*byte_symbols(), *(merge.replace(" ", "") for merge in MERGES)]
    tokens += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    writer = tokenizer_only(tmp_path / "t.gguf", architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 4) + [3, 3, 3, 4])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(len(tokens) - 4)
    writer.add_eos_token_id(len(tokens) - 2)
    writer.add_add_bos_token(pre == "llama-bpe")
    finish(writer)
    texts = [*TEXTS, "Hello the 123 12  3 <think>a</think> He'll", "a..b Helloworld"]
    # transformers composes no characters when it reads a GGUF; the models' own tokenizers do
    texts = [text for text in texts if pre != "qwen2" or "e\u0301" not in text]
    compare_tokenizers(tmp_path, texts)


@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_a_sentencepiece_vocabulary_gives_the_token_ids_of_the_gguf(
    tmp_path: Path, architecture: str
) -> None:
    words = ["▁t", "he", "▁the", "▁a", "er", "▁▁", "▁▁▁▁", "ll", "lo", "He", "Hello", "wor", "ld"]
    words += ["12", "▁H", "or", "hel", "▁w", "ap", "app", "les"]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzHIA0123456789.,'=;"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters]
    writer = tokenizer_only(tmp_path / "t.gguf", architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    plain = len(tokens) - 259
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(plain)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * plain)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    finish(writer)
    compare_tokenizers(tmp_path, [*TEXTS, "Hello the  apples", "hello<s>the</s> world", "  a    b"])


def compare_tokenizers(folder: Path, texts: list[str]) -> None:
    out = folder / "converted"
    out.mkdir()
    for name, content in gguf.side_files(gguf.open(folder / "t.gguf")).items():
        (out / name).write_bytes(content)
    ours = AutoTokenizer.from_pretrained(out)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="t.gguf")
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
