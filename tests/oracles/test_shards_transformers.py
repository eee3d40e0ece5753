"""Shards and their index, read by transformers, and transformers' own read here."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorasurgery.checkpoint import open_checkpoint
from lorasurgery.operations.convert_checkpoint import convert_checkpoint
from lorasurgery.output import INDEX, OutputOptions
from lorasurgery.surgery import RunOptions
from tests.oracles import tiny


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny.llama()


def test_transformers_loads_every_tensor_from_our_shards(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    how = RunOptions(OutputOptions(max_shard=10_000))
    convert_checkpoint(tmp_path / "model", tmp_path / "out", None, how)
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert len(set(index["weight_map"].values())) > 3
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    want = model.state_dict()
    got = loaded.state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_shards_and_the_index_that_transformers_writes_are_read(tmp_path, model):
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    theirs = json.loads((tmp_path / "model" / INDEX).read_bytes())
    checkpoint = open_checkpoint(tmp_path / "model")
    assert set(checkpoint) == set(theirs["weight_map"])
    sizes = sum(checkpoint.info(name).nbytes for name in checkpoint)
    assert theirs["metadata"]["total_size"] == sizes
    state = model.state_dict()
    for name in checkpoint:
        assert checkpoint.read(name).tobytes() == state[name].numpy().tobytes()
    convert_checkpoint(tmp_path / "model", tmp_path / "out", "BF16", RunOptions())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], state[name].bfloat16()) for name in checkpoint)
