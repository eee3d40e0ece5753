"""Records, tokens and labels: what is learned, and what is refused with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasurgery.errors import FormatError, LoraSurgeryError, UsageError
from lorasurgery.training import loss
from lorasurgery.training.batches import Order, collate
from lorasurgery.training.examples import IGNORED, Example, Reading, load
from lorasurgery.training.records import files, read
from tests.training_case import VOCAB, llama, tokenizer


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def text_of(example: Example, *, learned: bool) -> str:
    tokens = [t for t in (example.labels if learned else example.tokens) if t != IGNORED]
    return str(tokenizer().decode(tokens))


def test_a_text_is_cut_into_windows_that_lose_no_token(tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox, größer.")
    found = load([str(tmp_path / "a.txt")], tokenizer(), VOCAB, Reading(8))
    tokens = [t for e in found for t in e.tokens]
    assert tokenizer().decode(tokens) == "The quick brown fox, größer.<eos>"
    assert all(e.tokens == e.labels and len(e.tokens) <= 8 for e in found)


def test_of_a_completion_the_loss_is_on_what_completes_and_on_its_end(tmp_path):
    path = written(tmp_path / "a.jsonl", {"prompt": "2 + 2 =", "completion": " 4."})
    (found,) = load([path], tokenizer(), VOCAB, Reading())
    assert text_of(found, learned=False) == "2 + 2 = 4.<eos>"
    assert text_of(found, learned=True) == " 4.<eos>"


def test_of_a_chat_the_loss_is_on_every_answer_and_its_end_of_turn(tmp_path):
    turns = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Farewell."},
        {"role": "user", "content": "not answered"},
    ]
    path = written(tmp_path / "a.jsonl", {"messages": turns})
    (found,) = load([path], tokenizer(), VOCAB, Reading())
    assert text_of(found, learned=True) == "Hello!<eos>\nFarewell.<eos>\n"
    whole = "<system>Be short.<eos>\n<user>Hi<eos>\n<assistant>Hello!<eos>\n<user>Bye<eos>\n"
    assert text_of(found, learned=False) == f"{whole}<assistant>Farewell.<eos>\n"


def test_a_tokenizer_without_offsets_learns_the_same(tmp_path):
    class Slow:
        is_fast = False

        def __init__(self) -> None:
            self._inner = tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def __call__(self, text: str, **given: Any) -> Any:
            return self._inner(text, **given)

    path = written(tmp_path / "a.jsonl", {"prompt": "Say", "completion": " so"})
    assert load([path], Slow(), VOCAB, Reading()) == load([path], tokenizer(), VOCAB, Reading())


def test_a_directory_is_all_of_its_data_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text('{"text": "first"}\n\n{"text": "then"}\n')
    (tmp_path / "notes.md").write_text("no data")
    records = [record for path in files(str(tmp_path)) for record in read(path)]
    assert [r.text for r in records] == ["first", "then", "second"]
    assert [r.where for r in records] == [
        f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3", f"{tmp_path}/b.txt",
    ]  # fmt: skip


LINES = {
    '{"text": "a"': "no JSON (Expecting ',' delimiter: line 2 column 1 (char 13)). Mend the line.",
    "[1]": "a list, where a record is wanted: {text}, {prompt, completion}, {messages} or "
    "{text, label}. Mend the line.",
    '{"prompt": "a"}': "has 'prompt', where {text}, {prompt, completion}, {messages} or {text, label} "
    "is wanted. Mend the line.",
    "{}": "has nothing, where {text}, {prompt, completion}, {messages} or {text, label} is wanted. "
    "Mend the line.",
    '{"messages": [{"role": "user"}]}': "a message is {'role': 'user'}, where a role and a content are "
    "wanted. Mend the line.",
    '{"messages": [{"role": "user", "content": "x"}]}': "nobody answers in this chat. Add an "
    "assistant's message.",
    '{"prompt": "aaaaaaaaaaaaaaaaaaaaaaaa", "completion": "b"}': "nothing to learn in its first 16 of 26 "
    "tokens. Raise --length, or shorten the prompt.",
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(FormatError) as caught:
        load([str(path)], tokenizer(), VOCAB, Reading(16))
    assert str(caught.value) == f"{path}:2: {LINES[line]}"


def refused(*data: Path, vocabulary: int = VOCAB) -> str:
    with pytest.raises(LoraSurgeryError) as caught:
        load([str(path) for path in data], tokenizer(), vocabulary, Reading())
    return str(caught.value)


def test_data_that_is_not_there_or_empty_is_refused(tmp_path):
    nowhere, empty, blank = tmp_path / "nowhere", tmp_path / "empty", tmp_path / "blank.txt"
    empty.mkdir()
    blank.write_text(" \n")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Süd".encode("latin-1"))
    assert refused(nowhere) == f"{nowhere}: no such file or directory. Check the path of --data."
    assert refused(empty) == f"{empty}: no .txt or .jsonl file in it. Check the path of --data."
    assert refused(blank) == f"{blank}: no record in it. Give some text."
    assert refused(latin) == f"{latin}: no UTF-8 at byte 1. Save it as UTF-8."


def test_a_token_that_the_model_has_not_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("z")
    (highest,) = {256}  # <eos>
    assert refused(path, vocabulary=200) == (
        f"{path}: token id {highest}, but the model has 200 tokens. The tokenizer belongs to another "
        "model."
    )


def test_a_chat_needs_a_template(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(UsageError) as caught:
        load([path], bare, VOCAB, Reading())
    assert str(caught.value) == (
        f"{path}:1: is a chat, but the tokenizer has no chat template. Use prompt and completion."
    )


def test_packed_texts_have_the_losses_that_they_have_alone(tmp_path):
    words = ["short", "a longer one", "x", "the last of them all"]
    path = written(tmp_path / "a.jsonl", *({"text": w} for w in words))
    alone = load([path], tokenizer(), VOCAB, Reading(32))
    together = load([path], tokenizer(), VOCAB, Reading(32, pack=True))
    assert len(together) < len(alone) == 4
    model = llama().eval()
    with torch.no_grad():
        expected = sum(float(loss.total(model, collate([e], 0))) for e in alone)
        one = float(loss.total(model, collate(alone, 0)))
        packed = float(loss.total(model, collate(together, 0)))
    assert packed == pytest.approx(expected, rel=1e-6)
    assert one == pytest.approx(expected, rel=1e-6)
    assert sum(e.predicted for e in together) == sum(e.predicted for e in alone)
    assert collate(together, 0).predicted == sum(e.predicted for e in together)


def test_each_pass_shows_every_example_once_in_an_order_of_its_own():
    order = Order(7, seed=3)
    passes = [[order[i] for i in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) == 3
    assert [Order(7, seed=3)[i] for i in (13, 2, 8)] == [passes[1][6], passes[0][2], passes[1][1]]
    assert [Order(7, seed=4)[i] for i in range(7)] != passes[0]
