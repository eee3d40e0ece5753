"""A sentencepiece vocabulary in a GGUF: against sentencepiece itself, and gguf's own reading of its model."""

from __future__ import annotations

from pathlib import Path

import gguf as peer
import pytest
import sentencepiece
from gguf.vocab import SentencePieceVocab
from gguf_decoders import make_gguf_decoder
from merging import done
from transformers import AutoTokenizer, LlamaTokenizer

TEXT = Path(__file__).parents[2] / "benchmarks" / "texts" / "moby-dick.txt"
SIZE = 400
# none begins with a space, before which transformers puts no other; sentencepiece does, and llama.cpp
SENTENCES = (
    "Call me Ishmael.", "two  spaces and 1851", "über den Wellen 鯨", "a\nb\tc", "whales' hats--off",
)  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama with the tokenizer that sentencepiece trained for it, and its GGUF."""
    base = tmp_path_factory.mktemp("pieces") / "base"
    make_gguf_decoder(base, vocab_size=SIZE, bos_token_id=1, eos_token_id=2, num_hidden_layers=1)
    for file in base.glob("tokenizer*"):
        file.unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(TEXT), model_prefix=str(base / "tokenizer"), model_type="bpe", vocab_size=SIZE,
        byte_fallback=True, character_coverage=1.0, split_digits=True,
        allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", pad_id=-1, minloglevel=2,
    )  # fmt: skip
    LlamaTokenizer.from_pretrained(base).save_pretrained(base)
    out = base.with_name("out")
    done("export", base, "-o", out, "--to", "gguf")
    return base, out / "model.gguf"


def test_tokens_types_and_the_order_of_merges_are_those_of_gguf(
    exported: tuple[Path, Path],
) -> None:
    base, file = exported
    fields = peer.GGUFReader(file).fields
    theirs = list(SentencePieceVocab(base).all_tokens())
    ours = [
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "scores", "token_type")
    ]
    assert fields["tokenizer.ggml.model"].contents() == SentencePieceVocab.tokenizer_model
    assert [text.encode() for text in ours[0]] == [text for text, _, _ in theirs]
    assert ours[2] == [int(kind) for _, _, kind in theirs]
    # transformers keeps no scores, but the order that they mean: pieces of several letters, best first
    merged = [
        at for at, (text, _, kind) in enumerate(theirs) if kind == 1 and len(text.decode()) > 1
    ]
    assert len(merged) > 50
    best = sorted(merged, key=lambda at: -theirs[at][1])
    assert sorted(merged, key=lambda at: -ours[1][at]) == best
    for key, number in (("bos", 1), ("eos", 2), ("unknown", 0)):
        assert fields[f"tokenizer.ggml.{key}_token_id"].contents() == number
    assert fields["tokenizer.ggml.add_space_prefix"].contents() is True


def test_text_becomes_the_tokens_that_sentencepiece_makes_of_it(
    exported: tuple[Path, Path],
) -> None:
    base, file = exported
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    used: set[int] = set()
    for text in SENTENCES:
        want = pieces.encode(text)
        used.update(want)
        assert read(text, add_special_tokens=False)["input_ids"] == want, text
    # bytes for what it has no letter for, and pieces of several letters
    assert any(pieces.is_byte(at) for at in used)
    assert any(len(pieces.id_to_piece(at)) > 1 for at in used if not pieces.is_byte(at))
