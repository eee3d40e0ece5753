"""llama.cpp's adapter: names, one alpha, the order of rows, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quantize
from handmade import BASE_CONFIG, HEADS, HIDDEN, WIDE, adapter, delta, llama, lora, numbers
from typer.testing import CliRunner

from lorasurgery.adapter import Adapter, AdapterConfig
from lorasurgery.cli.app import app
from lorasurgery.dialects import gguf_lora, peft
from lorasurgery.errors import FormatError, MatchError
from lorasurgery.tensors import TensorInfo

Q = "model.layers.0.self_attn.q_proj"
# a scale baked into B rounds each of at most 4 products of at most 8, which may then cancel
CLOSE = {"rtol": 1e-6, "atol": 2e-6}
UP = "model.layers.0.mlp.up_proj"


def written(made: Adapter, folder: Path) -> Path:
    gguf_lora.write(made, folder)
    return folder / "adapter.gguf"


def stored(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    return {t.name: np.array(t.data) for t in GGUFReader(file).tensors}


def made_by_hand(
    path: Path, tensors: dict[str, Any], alpha: float | None = 6.0, **facts: Any
) -> Path:
    """A file as llama.cpp's converter writes it: it says nothing of heads."""
    said = {"architecture": "llama", "type": "adapter", "adapter": "lora", **facts}
    writer = GGUFWriter(path, said["architecture"])
    writer.add_type(said["type"])
    writer.add_string("adapter.type", said["adapter"])
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    if "tokens" in said:
        writer.add_array("adapter.alora.invocation_tokens", said["tokens"])
    for name, data in tensors.items():
        writer.add_tensor(name, np.asarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_llama_cpp_computes_is_the_adapter(tmp_path):
    made = llama()
    file = written(made, tmp_path)
    reader = GGUFReader(file)
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert reader.fields["general.architecture"].contents() == "llama"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = stored(file)
    named = {
        "blk.0.attn_q": 0, "blk.0.attn_k": 1, "blk.1.attn_v": 2, "blk.1.ffn_up": 3, "blk.1.ffn_down": 4,
    }  # fmt: skip
    assert tensors.keys() == {f"{n}.weight.lora_{ab}" for n in named for ab in "ab"}
    for name, index in named.items():
        a, b = (tensors[f"{name}.weight.lora_{ab}"] for ab in "ab")
        change = alpha / b.shape[1] * b @ a
        wanted = delta(made.sites[index])
        if "attn_q" in name or "attn_k" in name:  # llama.cpp's own permutation of a base's rows
            wanted = (
                wanted.reshape(HEADS, 2, HIDDEN // HEADS // 2, HIDDEN)
                .swapaxes(1, 2)
                .reshape(HIDDEN, HIDDEN)
            )
        np.testing.assert_allclose(change, wanted, **CLOSE)


def test_rows_of_k_follow_the_heads_of_keys(tmp_path):
    config = {**BASE_CONFIG, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = adapter([lora("model.layers.0.self_attn.k_proj", 8, HIDDEN)], base_config=config)
    file = written(made, tmp_path)
    wanted = made.sites[0].load()["B"].reshape(2, 2, 2, 3).swapaxes(1, 2).reshape(8, 3)
    np.testing.assert_array_equal(stored(file)["blk.0.attn_k.weight.lora_b"], wanted)
    (site,) = gguf_lora.read(file).sites
    np.testing.assert_array_equal(site.load()["B"], made.sites[0].load()["B"])


def test_one_alpha_is_kept_and_nothing_is_baked_where_it_says_all(tmp_path):
    made = adapter([lora(Q, HIDDEN, HIDDEN), lora(UP, WIDE, HIDDEN, AdapterConfig("lora", 2, 6.0))])
    file = written(made, tmp_path)
    assert GGUFReader(file).fields["adapter.lora.alpha"].contents() == 6.0
    np.testing.assert_array_equal(
        stored(file)["blk.0.ffn_up.weight.lora_b"], made.sites[1].load()["B"]
    )


@pytest.mark.parametrize("alpha", [0.0, None])
def test_an_alpha_of_0_is_no_scale(tmp_path, alpha):
    a, b = numbers((3, HIDDEN)), numbers((WIDE, 3), 1)
    names = {"blk.0.ffn_up.weight.lora_a": a, "blk.0.ffn_up.weight.lora_b": b}
    (site,) = gguf_lora.read(made_by_hand(tmp_path / "x.gguf", names, alpha)).sites
    assert site.module == UP
    np.testing.assert_array_equal(delta(site), b @ a)


def test_the_embedding_lies_as_llama_cpp_looks_it_up(tmp_path):
    made = adapter([lora("model.embed_tokens", 12, HIDDEN, layout="embedding")])
    file = written(made, tmp_path)
    tensors = stored(file)
    a, b = (tensors[f"token_embd.weight.lora_{ab}"] for ab in "ab")
    assert (a.shape, b.shape) == ((12, 3), (HIDDEN, 3))
    np.testing.assert_array_equal(6.0 / 3 * a @ b.T, delta(made.sites[0]))
    (site,) = gguf_lora.read(file).sites
    assert site.layout == "embedding"
    np.testing.assert_array_equal(delta(site), delta(made.sites[0]))


def test_quantized_factors_are_read(tmp_path):
    a, b = numbers((3, 32)), numbers((32, 3), 1)
    packed = quantize(a, GGMLQuantizationType.Q8_0)
    writer = GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # qwen2's rows lie as they are
    (site,) = gguf_lora.read(tmp_path / "x.gguf").sites
    np.testing.assert_allclose(site.load()["A"], a, atol=2 / 127)
    np.testing.assert_array_equal(site.load()["B"], b)


def test_heads_that_the_file_does_not_say_are_in_the_config_beside_it(tmp_path):
    a, b = numbers((3, HIDDEN)), numbers((HIDDEN, 3), 1)
    names = {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}
    file = made_by_hand(tmp_path / "x.gguf", names)
    (problem,) = gguf_lora.read(file).problems
    assert problem.message == (
        "blk.0.attn_q.weight: the rows of its lora_b are in llama.cpp's order, and nothing says how many "
        "heads there are. Put the base's config.json beside the file"
    )
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4}))
    (site,) = gguf_lora.read(file).sites
    wanted = np.empty_like(b).reshape(4, 2, 2, 3)
    wanted[:] = b.reshape(4, 2, 2, 3).swapaxes(1, 2)
    np.testing.assert_array_equal(site.load()["B"], wanted.reshape(HIDDEN, 3))
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 3}))
    (problem,) = gguf_lora.read(file).problems
    assert problem.message == (
        "blk.0.attn_q.weight: the rows of its lora_b are in llama.cpp's order, and 16 are not 3 heads. "
        "Put the base's config.json beside the file"
    )


def test_a_model_is_no_adapter(tmp_path):
    file = made_by_hand(tmp_path / "x.gguf", {"token_embd.weight": numbers((4, 4))}, type="model")
    assert not gguf_lora.detect(file)


PROBLEMS = {
    "a norm": (
        {"blk.0.attn_norm.weight": numbers((HIDDEN,))},
        "blk.0.attn_norm.weight [16] is no lora_a or lora_b, and llama.cpp ignores it",
    ),
    "a factor alone": (
        {"blk.0.ffn_up.weight.lora_a": numbers((3, HIDDEN))},
        "blk.0.ffn_up.weight.lora_a stands alone: blk.0.ffn_up.weight needs lora_a and lora_b",
    ),
    "a strange tensor": (
        {"blk.0.ssm_in.weight.lora_a": numbers((3, 4)), "blk.0.ssm_in.weight.lora_b": numbers((4, 3))},
        "blk.0.ssm_in.weight.lora_a: llama has no tensor blk.0.ssm_in.weight",
    ),
    "ranks that differ": (
        {"blk.0.ffn_up.weight.lora_a": numbers((3, 4)), "blk.0.ffn_up.weight.lora_b": numbers((4, 2))},
        "blk.0.ffn_up.weight: lora_a [3, 4] and lora_b [4, 2] are no factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_not_understood_is_a_problem(tmp_path, case):
    tensors, message = PROBLEMS[case]
    found = gguf_lora.read(made_by_hand(tmp_path / "x.gguf", tensors))
    assert [p.message for p in found.problems] == [message]


UNREAD = {
    "another method": ({"adapter": "control"}, MatchError, "{}: adapter.type is 'control', and 'lora' is read. Use llama.cpp for it."),
    "some tokens alone": (
        {"tokens": [1, 2]}, MatchError,
        "{}: adapter.alora.invocation_tokens: it acts on some tokens alone, so no merged weight does the "
        "same. Use llama.cpp for it.",
    ),
    "a strange architecture": (
        {"architecture": "mamba"}, FormatError,
        "{}: architecture 'mamba' is not mapped to transformers' names. Known: llama, qwen2, qwen3, phi3.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNREAD)
def test_what_is_no_lora_of_a_known_model_is_refused(tmp_path, case):
    facts, kind, message = UNREAD[case]
    file = made_by_hand(tmp_path / "x.gguf", {"a": numbers((2, 2))}, **facts)
    with pytest.raises(kind) as error:
        gguf_lora.read(file)
    assert str(error.value) == message.format(file)


def refused(made: Adapter) -> str:
    with pytest.raises(FormatError) as error:
        gguf_lora.write(made, Path("nowhere"))
    return str(error.value).removeprefix("made/by-hand: ")


def test_what_llama_cpp_cannot_hold_is_refused():
    it = lora(Q, HIDDEN, HIDDEN)
    assert refused(adapter([it], base_config={})) == (
        "a GGUF adapter names tensors and orders rows as its base does, whose config.json is not given. "
        "Give the base."
    )
    assert refused(adapter([it], base_config={"model_type": "gpt2"})) == (
        "the base is a gpt2, whose GGUF names are not known. Known: llama, qwen2, qwen3, phi3."
    )
    assert refused(adapter([it], base_config={"model_type": "llama"})) == (
        "the base's config.json does not say how many heads it has, after which llama.cpp orders the rows of "
        "q and k. Give the base."
    )
    assert refused(adapter([it], base_config={**BASE_CONFIG, "num_attention_heads": 3})) == (
        f"{Q}: B has 16 rows, which are not 3 heads of an even size. Check the base."
    )
    assert refused(adapter([lora("model.layers.0.mlp.experts", WIDE, HIDDEN)])) == (
        "model.layers.0.mlp.experts has no tensor in GGUF's llama. Merge it, or leave it out."
    )
    tied = {**BASE_CONFIG, "tie_word_embeddings": True}
    assert refused(adapter([lora("lm_head", WIDE, HIDDEN)], base_config=tied)) == (
        "lm_head is adapted, but the base ties it to the embedding, and its GGUF has no tensor of that name. "
        "Merge it, or leave it out."
    )
    assert refused(adapter([replace(it, kernel=(1, 1))])) == (
        f"{Q} is a convolution, which llama.cpp cannot adapt. Merge it."
    )
    whole = {"lm_head.weight": TensorInfo("lm_head.weight", "F32", (4, 4))}
    assert refused(adapter([it], replaced=whole)) == (
        "lm_head.weight is replaced as a whole, which llama.cpp cannot say. Merge it, convert it, or write "
        "another dialect."
    )


def test_commands_that_are_given_the_base_write_it(tmp_path):
    base, source = small.base(tmp_path / "base"), small.adapter(tmp_path / "it")
    merged, out = tmp_path / "merged", tmp_path / "out"
    command(["merge", base, source, "-o", merged, "--dtype", "float32"])
    command(["convert", source, "--base", base, "-o", out / "a", "--dialect", "gguf_lora"])
    command(
        ["extract", base, merged, "--rank", small.RANK, "-o", out / "b", "--dialect", "gguf_lora"]
    )
    given = ["--base", base, "--dialect", "gguf_lora"]
    command(["prune", source, "--rank", small.RANK, "-o", out / "c", *given])
    command(["combine", f"{source}:0.25", f"{source}:0.75", "-o", out / "d", *given])
    wanted = {s.module: delta(s) for s in peft.read(source).sites}
    for found in (gguf_lora.read(out / name) for name in "abcd"):
        assert {s.module for s in found.sites} >= wanted.keys()
        for site in found.sites:
            if (
                site.module in wanted
            ):  # extract takes them out of float32 sums, each of them rounded
                change = np.abs(delta(site) - wanted[site.module]).max()
                assert change < 1e-3 * np.abs(wanted[site.module]).max()


def command(arguments: list[object]) -> None:
    done = CliRunner().invoke(app, [*map(str, arguments), "-q"])
    assert done.exit_code == 0, done.output
