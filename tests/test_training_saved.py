"""--mem-report: what autograd itself is seen to keep, and LoRA-FA's part of LoRA's."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from lorasurgery.training import saved
from tests.test_training_cli import done, refused
from tests.training_case import TEXT, begin, options, save_base

# 0.8 million parameters: rows are so long that rank 8 is little beside them
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}

SHORT = ("-m", "lora-fa", "--steps", 2, "--batch", 2, "--length", 48, "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("saved") / "base", **SIZES)


def asked(method, rank=8, **pace):
    found = options(method, **pace)
    return replace(found, wanted=replace(found.wanted, rank=rank))


def test_each_piece_of_memory_counts_once_and_weights_do_not():
    layer = nn.Linear(6, 5)
    x = torch.randn(7, 6, requires_grad=True)
    # the x that is kept twice; the weight is the model's own
    assert saved.kept(layer, lambda: layer(x) + layer(x)) == 7 * 6 * 4
    # exp keeps its output, relu too: the same sizes, other memory
    assert saved.kept(layer, lambda: layer(x).exp().relu()) == 7 * 6 * 4 + 2 * 7 * 5 * 4


def test_nothing_that_was_counted_stays_in_memory():
    layer, held = nn.Linear(6, 5), []

    def forward():
        y = layer(torch.randn(7, 6)).exp()  # which exp keeps for its own gradient
        held.append(weakref.ref(y))
        return y.sum()

    saved.kept(layer, forward)
    assert held[0]() is None


def test_lora_fa_keeps_at_most_a_twentieth_of_what_lora_keeps_for_its_adapter(base):
    found = {name: saved.report(begin(base, asked(name)).trainer) for name in ("lora", "lora-fa")}
    lora, fa = found["lora"], found["lora-fa"]
    assert fa["saved_bytes_of_adapter"] <= 0.05 * lora["saved_bytes_of_adapter"]
    # its own report says what LoRA would keep
    assert fa["saved_bytes_as_lora"] == lora["saved_bytes"] == lora["saved_bytes_as_lora"]
    assert fa["saved_bytes_of_lora_adapter"] == lora["saved_bytes_of_adapter"]
    assert fa["saved_bytes_of_base"] == lora["saved_bytes_of_base"]
    assert fa["saved_bytes"] <= 0.8 * lora["saved_bytes"]
    assert fa["saved_share"] == fa["saved_bytes"] / lora["saved_bytes"]
    own, theirs = (of["saved_bytes_of_adapter"] for of in (fa, lora))
    assert fa["saved_share_of_adapter"] == own / theirs
    assert "saved_share" not in lora


def test_what_lora_keeps_is_each_input_that_the_base_does_not_keep_and_its_own_product(base):
    prepared = begin(base, asked("lora"))
    found = saved.report(prepared.trainer)
    tokens = prepared.trainer.batches(1)[0].tokens.numel()
    # q, k and v see one x, gate and up another, down its own; that of o attention keeps itself
    x = 256 + 256 + 512
    # the first norm is of embeddings, that nothing trained comes before: x and a number for each token
    first = 256 + 1
    # and u of rank 8 for each of the seven
    assert found["saved_bytes_of_adapter"] == 4 * tokens * (x - first + 7 * 8)


def test_a_report_changes_no_bit_of_the_run(base, tmp_path):
    one, two = (
        done("train", base, "--data", TEXT, "-o", tmp_path / name, *SHORT, "--json", *flag)
        for name, flag in (("one", ()), ("two", ("--mem-report",)))
    )
    name = "adapter_model.safetensors"
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    total, plain = json.loads(two)["total"], json.loads(one)["total"]
    told = {key: total[key] for key in total.keys() - plain.keys()}
    assert total == {**plain, **told}
    assert told.keys() == {
        "saved_bytes", "saved_bytes_of_base", "saved_bytes_of_adapter", "saved_bytes_as_lora",
        "saved_bytes_of_lora_adapter", "saved_share", "saved_share_of_adapter",
    }  # fmt: skip


def test_it_is_told_as_a_table(base):
    said = done("train", base, "--data", TEXT, "--dry-run", *SHORT, "--mem-report")
    titles = [re.split(r"\s{2,}", line.strip())[0] for line in said.splitlines()]
    assert titles[4:-1] == [
        "kept for backward", "by the base alone", "for the adapter", "with A and B trained", "for that adapter",
        "kept, of what LoRA keeps", "for the adapter",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["dora", "vera", "moral", "delta-lora"])
def test_of_a_method_that_is_no_lora_nothing_is_said_of_lora(base, method):
    prepared = begin(base, asked(method))
    found = saved.report(prepared.trainer)
    assert found.keys() == {"saved_bytes", "saved_bytes_of_base", "saved_bytes_of_adapter"}
    assert found["saved_bytes_of_adapter"] > 0
    # nothing is left as the count had it
    assert saved.report(prepared.trainer) == found
    assert torch.is_grad_enabled()
    assert not prepared.trainer.parts.model.get_input_embeddings()._forward_hooks


def test_where_activations_are_kept_elsewhere_they_are_not_counted(base, tmp_path):
    call = (
        "train",
        base,
        "--data",
        TEXT,
        "-o",
        tmp_path / "out",
        "--mem-report",
        "--checkpointing",
    )
    assert refused(*call, "--device", "cpu") == (
        2,
        "--mem-report: counts what one forward pass keeps, and --checkpointing keeps it elsewhere. Take one of them "
        "away.",
    )
    assert list(tmp_path.iterdir()) == []
