"""A classifier of sequences: its head is trained whole, and PEFT loads what is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from lorasurgery.errors import FormatError
from lorasurgery.training.examples import Reading
from tests.training_case import VOCAB, begin, options, run, save_base, tokenizer

CLASSES = ("question", "statement")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("classifier")


@pytest.fixture(params=["llama", "bert"])
def base(request, home):
    folder = home / request.param
    if request.param == "llama":
        return save_base(folder)
    torch.manual_seed(0)
    BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            vocab_size=VOCAB, max_position_embeddings=64, num_labels=2,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(home):
    rows = [("Is it?", "question"), ("So it is.", "statement"), ("Who? Why?", "question")]
    path = home / "data.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows * 3))
    return path


def asked(data, **pace):
    found = options(steps=12, rate=2e-2, batch=3, **pace)
    return replace(found, data=(str(data),), reading=Reading(32, classes=CLASSES))


def test_a_classifier_learns_and_peft_computes_what_was_trained(base, data, tmp_path):
    prepared = begin(base, asked(data))
    trainer = prepared.trainer
    losses = [trainer.step()["loss"] for _ in range(12)]
    assert losses[-1] < 0.7 * losses[0]
    total = run(base, tmp_path / "out", asked(data))
    head = list(trainer.parts.detours.whole)
    assert head in (["score.weight"], ["classifier.weight", "classifier.bias"])
    assert total["trained_parameters"] == sum(
        n.parameter.numel() for n in trainer.parts.detours.named()
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == [head[0].partition(".")[0]]
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    plain.config.pad_token_id = 0
    loaded = PeftModel.from_pretrained(plain, str(tmp_path / "out")).eval()
    (batch,) = trainer.batches(1)
    ours = trainer.parts.model.eval()
    with torch.no_grad():
        given = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        found, wanted = ours(**given).logits, loaded(**given).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    expected = float(cross_entropy(wanted, batch.labels))
    assert trainer.evaluate([trainer.parts.examples[i] for i in range(9)]) < losses[0]
    assert expected < losses[0]


def test_a_label_that_is_none_of_the_classes_is_named(base, home):
    path = home / "wrong.jsonl"
    path.write_text('{"text": "Well", "label": "sigh"}\n')
    with pytest.raises(FormatError) as caught:
        begin(base, asked(path))
    assert str(caught.value) == (
        f"{path}:1: the label is 'sigh', where one of question, statement is wanted. Mend the line."
    )
