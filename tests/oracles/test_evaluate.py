"""evaluate and generate against transformers itself, on a tiny model with a tokenizer of its own."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from lorasurgery.cli.app import app

WORDS = [f"w{i}" for i in range(61)]
TEXT = " ".join(WORDS[(7 * i * i + i) % 61] for i in range(50))
WINDOW = 16


def surgery(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def make(folder: Path, seed: int, vocabulary: int = 64) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocabulary,
        )
    ).save_pretrained(folder)
    words = {"<s>": 0, "</s>": 1, "?": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?"
    )
    fast.chat_template = "{% for m in messages %}w1 {{ m['content'] }} w2 {% endfor %}"
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("two")
    return make(home / "one", 0), make(home / "other", 1)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def scores(path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(log p of each next token, the tokens that came) of each window."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.tensor([WORDS.index(w) + 3 for w in TEXT.split()])
    found = []
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[start : start + WINDOW]
        with torch.no_grad():
            found.append((model(part[None]).logits[0, :-1].double().log_softmax(-1), part[1:]))
    return found


def evaluated(*arguments):
    result = surgery("evaluate", *arguments, "--window", WINDOW, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_perplexity_is_that_of_transformers_own_loss(two, text):
    model = AutoModelForCausalLM.from_pretrained(two[0], dtype=torch.float32)
    losses, count = 0.0, 0
    ids = torch.tensor([WORDS.index(w) + 3 for w in TEXT.split()])
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[None, start : start + WINDOW]
        with torch.no_grad():
            losses += model(part, labels=part).loss.item() * (part.shape[1] - 1)
        count += part.shape[1] - 1
    found = evaluated(two[0], "--text", text)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(losses / count), rel=1e-5)
    assert found["divergence"] is None


def test_divergence_and_agreement_are_those_of_the_distributions(two, text):
    pairs = list(zip(scores(two[0]), scores(two[1]), strict=True))
    tokens = sum(len(a) for (a, _), _ in pairs)
    kl = sum((a.exp() * (a - b)).sum().item() for (a, _), (b, _) in pairs) / tokens
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for (a, _), (b, _) in pairs) / tokens
    found = evaluated(*two, "--text", text)
    assert found["divergence"] == pytest.approx(kl, rel=1e-4)
    assert found["agreement"] == pytest.approx(same)


def test_a_model_is_no_way_from_itself(two, text):
    found = evaluated(two[0], two[0], "--text", text)
    assert found["divergence"] == pytest.approx(0.0, abs=1e-9)
    assert found["agreement"] == 1.0
    assert found["perplexity"] == found["other_perplexity"]


def test_models_of_different_vocabularies_are_not_compared(two, text, tmp_path):
    other = make(tmp_path / "wide", 2, vocabulary=70)
    result = surgery("evaluate", two[0], other, "--text", text)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {other}: has 70 tokens, {two[0]} 64: their distributions cannot be compared.\n"
    )


def test_a_text_of_one_token_predicts_nothing(two, tmp_path):
    (tmp_path / "short.txt").write_text("w1")
    result = surgery("evaluate", two[0], "--text", tmp_path / "short.txt")
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the text is 1 tokens long: nothing can be predicted. Give more.\n"
    )


def test_greedy_text_is_that_of_transformers(two):
    model = AutoModelForCausalLM.from_pretrained(two[0], dtype=torch.float32)
    ids = torch.tensor([[WORDS.index(w) + 3 for w in ("w5", "w9")]])
    made = model.generate(ids, max_new_tokens=9, do_sample=False)[0, 2:]
    wanted = " ".join(WORDS[i - 3] for i in made.tolist() if i >= 3)
    result = surgery("generate", two[0], "w5 w9", "--tokens", 9)
    assert (result.exit_code, result.stdout) == (0, wanted + "\n")


def test_chat_puts_the_prompt_into_the_template(two):
    plain = surgery("generate", two[0], "w1 w5 w2", "--tokens", 9, "--json")
    chat = surgery("generate", two[0], "w5", "--chat", "--tokens", 9, "--json")
    answers = [json.loads(r.stdout)["answers"] for r in (plain, chat)]
    assert answers[0]["w1 w5 w2"] == answers[1]["w5"]


def test_a_directory_without_a_config_is_refused(tmp_path):
    result = surgery("generate", tmp_path, "w1")
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {tmp_path}: no config.json in it, so that no model can be built. Name one.\n"
    )
