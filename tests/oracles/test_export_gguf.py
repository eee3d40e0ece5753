"""Models exported to GGUF: against transformers' reader, gguf's own, and what they were made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf as peer
import numpy as np
import pytest
import torch
from gguf_decoders import TEXT, make_gguf_decoder
from merging import done, make_adapter, surgery
from peft import PeftModel
from safetensors.numpy import load_file
from tiny import Base
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lorasurgery.formats import gguf

TOKENS = torch.tensor([[0, 5, 299, 17, 17, 200, 33]])
LoadGguf = Callable[[Path], PreTrainedModel]


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf_decoder(tmp_path_factory.mktemp("gguf") / "base")


@pytest.fixture(scope="session")
def adapter(decoder: Path) -> Path:
    base = Base(decoder, AutoModelForCausalLM, torch.float32)
    return make_adapter(
        base, decoder.with_name("small"), target_modules=["q_proj", "k_proj", "down_proj"]
    )


def scores(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(TOKENS).logits[0].numpy()


def of(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_transformers_reads_the_export_and_computes_what_the_model_does(
    tmp_path: Path, load_gguf: LoadGguf, kind: str, changes: dict[str, Any]
) -> None:
    base = make_gguf_decoder(tmp_path / "base", kind, **changes)
    done("export", base, "-o", tmp_path / "out", "--to", "gguf", "--type", "f32")
    theirs = load_gguf(tmp_path / "out" / "model.gguf")
    np.testing.assert_allclose(scores(theirs), scores(of(base)), atol=2e-5)


@pytest.mark.parametrize("biases", [False, True])
def test_what_is_read_back_are_the_same_weights_and_the_same_tokens(
    tmp_path: Path, biases: bool
) -> None:
    # transformers' own reader leaves a llama's biases out
    changes = {"attention_bias": biases, "mlp_bias": biases}
    decoder = make_gguf_decoder(tmp_path / "base", **changes)
    done("export", decoder, "-o", tmp_path / "out", "--to", "gguf", "--type", "f32")
    done("convert-checkpoint", tmp_path / "out" / "model.gguf", "-o", tmp_path / "back")
    before, after = (load_file(f / "model.safetensors") for f in (decoder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], weight, err_msg=name)
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path / "back", decoder))
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.bos_token == "<s>"
    file = tmp_path / "out" / "model.gguf"
    assert not gguf.remarks(gguf.open(file))
    if biases:
        found = {t.name: t.data for t in peer.GGUFReader(file).tensors}
        rows = permuted(before["model.layers.1.self_attn.q_proj.bias"], 4)
        np.testing.assert_array_equal(found["blk.1.attn_q.bias"], rows)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp orders the rows of q and k."""
    rows = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:])
    return rows.swapaxes(1, 2).reshape(w.shape)


@pytest.mark.parametrize("kind", ["bf16", "f16", "q8_0", "q4_0", "q4_1"])
def test_gguf_reads_what_it_would_have_quantized_itself(
    decoder: Path, tmp_path: Path, kind: str
) -> None:
    done("export", decoder, "-o", tmp_path / "out", "--to", "gguf", "--type", kind)
    weights = load_file(decoder / "model.safetensors")
    found = {t.name: t for t in peer.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    table = "Q8_0" if kind.startswith("q4") else kind.upper()
    for name, source, heads in (
        ("token_embd.weight", "model.embed_tokens.weight", 0),
        ("output.weight", "lm_head.weight", 0),
        ("blk.1.attn_q.weight", "model.layers.1.self_attn.q_proj.weight", 4),
        ("blk.0.attn_k.weight", "model.layers.0.self_attn.k_proj.weight", 2),
        ("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight", 0),
    ):
        w, tensor = weights[source], found[name]
        wanted = peer.GGMLQuantizationType[kind.upper() if name.startswith("blk") else table]
        assert tensor.tensor_type == wanted, name
        data = peer.quantize(permuted(w, heads) if heads else w, wanted)
        np.testing.assert_array_equal(
            np.asarray(tensor.data).view(np.uint8), data.view(np.uint8), err_msg=name
        )
    assert found["output_norm.weight"].tensor_type == peer.GGMLQuantizationType.F32
    assert len(found) == 2 * 9 + 3
    report = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert report["operation"] == "export"
    assert report["settings"]["type"] == kind
    assert 1e-5 < report["total"]["relative_error"] < 0.1


def test_rows_that_are_no_whole_blocks_stay_16_bit(tmp_path: Path) -> None:
    base = make_gguf_decoder(tmp_path / "base", intermediate_size=80)
    result = done("export", base, "-o", tmp_path / "out", "--to", "gguf", "--type", "q8_0")
    assert (
        "note: 2 matrices are F16, such as model.layers.0.mlp.down_proj.weight: their rows of 80 are "
        "no whole blocks of 32." in result.stderr
    )
    file = gguf.open(tmp_path / "out" / "model.gguf")
    assert file.storage("model.layers.1.mlp.down_proj.weight")[0] == "F16"


def test_smollm2_comes_back_byte_for_byte(smollm2: Path, tmp_path: Path) -> None:
    """Its weights lie on Q4_1's grid: the file holds nothing else."""
    done("convert-checkpoint", smollm2, "-o", tmp_path / "base", "--dtype", "float32")
    done("export", tmp_path / "base", "-o", tmp_path / "out", "--to", "gguf", "--type", "q4_1")
    one, two = gguf.open(smollm2), gguf.open(tmp_path / "out" / "model.gguf")
    assert set(one) == set(two)
    for name in one:
        mine, theirs = two._tensors[name], one._tensors[name]
        assert mine.kind == theirs.kind
        assert two.raw(mine) == one.raw(theirs), name
    for key in ("tokens", "merges", "token_type"):
        assert two.array(f"tokenizer.ggml.{key}") == one.array(f"tokenizer.ggml.{key}")
    for key in ("pre", "model", "bos_token_id", "eos_token_id", "add_bos_token"):
        assert two.values[f"tokenizer.ggml.{key}"] == one.values[f"tokenizer.ggml.{key}"]


def test_llama_3s_rope_is_a_tensor_of_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 256,
    }  # fmt: skip
    base = make_gguf_decoder(tmp_path / "base", rope_parameters=rope, max_position_embeddings=2048)
    done("export", base, "-o", tmp_path / "out", "--to", "gguf")
    model = of(base)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** (-torch.arange(0, 16, 2) / 16)
    found = {t.name: t.data for t in peer.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    np.testing.assert_allclose(found["rope_freqs.weight"], (plain / scaled).numpy(), rtol=1e-5)


def test_an_nf4_base_is_exported_as_it_decodes(decoder: Path, tmp_path: Path) -> None:
    done("quantize", decoder, "-o", tmp_path / "nf4")
    done("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain")
    for name in ("nf4", "plain"):
        done("export", tmp_path / name, "-o", tmp_path / f"{name}-out", "--to", "gguf")
    one, two = (gguf.open(tmp_path / f"{n}-out" / "model.gguf") for n in ("nf4", "plain"))
    for name in one:
        np.testing.assert_array_equal(one.read(name), two.read(name))
    assert "quantization_config" not in json.loads((tmp_path / "nf4-out/config.json").read_text())


def test_a_merged_adapter_is_in_the_weights(
    decoder: Path, adapter: Path, tmp_path: Path, load_gguf: LoadGguf
) -> None:
    export = "export", decoder, "-o", tmp_path / "out", "--to", "gguf", "--type", "f32"
    done(*export, "-a", adapter, "--merge-adapters")
    theirs = scores(PeftModel.from_pretrained(of(decoder), adapter))
    ours = scores(load_gguf(tmp_path / "out" / "model.gguf"))
    assert np.abs(theirs - scores(of(decoder))).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_adapters_stand_beside_the_model_as_llama_cpp_reads_them(
    decoder: Path, adapter: Path, tmp_path: Path
) -> None:
    result = done("export", decoder, "-o", tmp_path / "out", "--to", "gguf", "-a", adapter)
    done("convert", adapter, "-o", tmp_path / "one", "--for", "llamacpp", "--base", decoder)
    beside = tmp_path / "out" / "adapters" / "small.gguf"
    assert beside.read_bytes() == (tmp_path / "one" / "adapter.gguf").read_bytes()
    assert "llama-cli -m DIR/model.gguf --lora DIR/adapters/small.gguf" in result.stderr
    # llama.cpp asks for the base's shapes under the base's names
    base = {t.name: t for t in peer.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    for factor in peer.GGUFReader(beside).tensors:
        name, _, side = factor.name.rpartition(".lora_")
        end = int(side == "b")
        assert factor.shape[end] == base[name].shape[end], factor.name


def test_evaluate_reads_it_in_transformers_and_says_so(decoder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    done("export", decoder, "-o", tmp_path / "out", "--to", "gguf", "--type", "f32")
    result = done(
        "evaluate", decoder, tmp_path / "out", "--runtime", "transformers", "--text",
        tmp_path / "text.txt", "--json",
    )  # fmt: skip
    found = json.loads(result.stdout)
    assert found["other_runtime"] == "transformers, from decoded GGUF"
    assert abs(found["divergence"]) < 1e-6
    assert found["agreement"] == 1


def unigram(folder: Path) -> None:
    Tokenizer(models.Unigram([("a", 0.0)])).save(str(folder / "tokenizer.json"))


def strange_split(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


def setting(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            setting(model_type="gpt2"),
            "{base}: model_type 'gpt2' is not exported to GGUF. Known: llama, mistral, qwen2, qwen3.",
        ),
        (
            setting(model_type="phi3"),
            "{base}: model_type 'phi3' is not exported to GGUF. Known: llama, mistral, qwen2, qwen3.",
        ),
        (
            setting(hidden_act="gelu"),
            "{base}: hidden_act is 'gelu', and llama.cpp computes 'silu'. Export --to onnx.",
        ),
        (
            setting(partial_rotary_factor=0.5),
            "{base}: partial_rotary_factor is 0.5, and llama.cpp turns whole heads of this "
            "architecture. Export --to onnx.",
        ),
        (
            setting(rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "{base}: rope scaling 'dynamic' has no place in a GGUF of this architecture. Export --to onnx.",
        ),
        (
            setting(num_hidden_layers=3),
            "{base}: lacks model.layers.2.input_layernorm.weight, "
            "model.layers.2.post_attention_layernorm.weight, model.layers.2.self_attn.q_proj.weight "
            "(9 in all), which its config.json asks for. Restore the model.",
        ),
        (
            setting(vocab_size=300),
            "{base}: tokenizer.json has token 305, and the embedding 300 rows. Are the two of one model?",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            "{base}: has no tokenizer.json, and llama.cpp takes the vocabulary out of the GGUF. Add it: "
            "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
        ),
        (
            unigram,
            "{base}: tokenizer.json has model 'Unigram', for which GGUF has no name. Export --to onnx.",
        ),
        (
            strange_split,
            "{base}: tokenizer.json has a pre-tokenizer (WhitespaceSplit), for which GGUF has no name. "
            "Export --to onnx.",
        ),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    base = make_gguf_decoder(tmp_path / "base")
    damage(base)
    result = surgery("export", base, "-o", tmp_path / "out", "--to", "gguf")
    assert result.exit_code != 0
    assert result.stderr.strip() == f"error: {message.format(base=base)}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_flags_of_another_target_are_refused(decoder: Path, adapter: Path, tmp_path: Path) -> None:
    for flags, message in (
        (
            ["--to", "gguf", "--weights", "nf4"],
            "--weights: means nothing to --to gguf. Take it away.",
        ),
        (["--type", "q8_0"], "--type: means nothing to --to onnx. Take it away."),
        (["--to", "vllm", "--head"], "--head: means nothing to --to vllm. Take it away."),
        (
            ["--to", "gguf", "-a", f"{adapter}:0.5"],
            f"--adapter {adapter}:0.5: an adapter beside the model is weighed by whoever loads it. Take "
            "the weight away, or pass --merge-adapters.",
        ),
    ):
        result = surgery("export", decoder, "-o", tmp_path / "out", *flags)
        assert result.stderr.strip() == f"error: {message}"
    assert not list(tmp_path.iterdir())
    unknown = surgery("export", decoder, "-o", tmp_path / "out", "--to", "gguf", "--type", "q2_k")
    assert unknown.exit_code == 2
    assert "'q2_k' is not one of" in unknown.stderr


def test_llama_cpp_that_is_not_installed_is_named(
    decoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorasurgery.operations.running import model

    monkeypatch.setattr(model, "find_spec", lambda _: None)
    result = surgery("generate", decoder, "It", "--runtime", "llamacpp")
    assert result.stderr.strip() == (
        f"error: llamacpp runs {decoder}, and llama_cpp is not installed. Run `pip install llama-cpp-python`."
    )
