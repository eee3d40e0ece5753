"""lint: what each runtime makes of an adapter, from the one table; and the table itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import small
from handmade import adapter, llama, lora
from typer.testing import CliRunner, Result

from lorasurgery import plugins
from lorasurgery.adapter import AdapterConfig
from lorasurgery.cli.app import app
from lorasurgery.dialects import diffusers, gguf_lora, kohya, peft
from lorasurgery.errors import UnknownNameError
from lorasurgery.operations.lint import lint
from lorasurgery.operations.runtimes.claims import RUNTIMES
from lorasurgery.operations.runtimes.features import features
from lorasurgery.tensors import TensorInfo


def linted(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["lint", *map(str, arguments)])


def verdicts(path: Path, runtime: str, base: Path | None = None) -> dict[str, str]:
    return {row.feature: row.verdict for row in lint(path, runtime, base).rows}


def test_a_plain_lora_is_read_by_whoever_reads_its_layout(tmp_path):
    path = small.adapter(tmp_path / "it")
    for runtime in ("vllm", "sglang", "llamacpp", "ort", "peft"):
        assert verdicts(path, runtime) == {}
    done = linted(path, "--for", "vllm")
    assert done.exit_code == 0
    assert done.stdout == f"{path}: plain LoRA of one rank and one alpha; vllm reads it\n"


def test_a_scale_that_vllm_drops_is_silently_wrong_there(tmp_path):
    path = small.adapter(tmp_path / "it", alpha_pattern={"up_proj": 3.0}, use_rslora=True)
    assert verdicts(path, "vllm") == {"rsLoRA": "ok", "alpha_pattern": "silent"}
    assert verdicts(path, "sglang") == {"rsLoRA": "silent", "alpha_pattern": "silent"}
    assert verdicts(path, "llamacpp") == {"rsLoRA": "silent", "alpha_pattern": "silent"}
    assert verdicts(path, "ort") == {"rsLoRA": "ok", "alpha_pattern": "silent"}
    assert verdicts(path, "peft") == {"rsLoRA": "ok", "alpha_pattern": "ok"}
    done = linted(path, "--for", "vllm")
    assert done.exit_code == 3
    assert done.stdout == (
        "rsLoRA         ok              6 x: use_rslora is read [vllm/lora/peft_helper.py: "
        "vllm-project/vllm#6909 (2024-12) to 0214369]\n"
        "alpha_pattern  silently wrong  2 x: it reads r and lora_alpha, and scales every module by the one "
        "alpha / r [vllm/lora/peft_helper.py: 0214369]\n"
    )
    assert done.stderr == (
        f"error: {path}: vllm does not compute what it was trained to: alpha_pattern (silent). Convert it: "
        "lorasurgery convert --for vllm.\n"
    )


def test_ranks_that_differ_but_scale_alike_are_not_called_wrong(tmp_path):
    sites = [
        lora("a", 4, 6, AdapterConfig("lora", 2, 4.0)), lora("bb", 4, 6, AdapterConfig("lora", 2, 4.0)),
        lora("ccc", 4, 6, AdapterConfig("lora", 4, 8.0)),
    ]  # fmt: skip
    peft.write(adapter(sites), tmp_path)
    assert verdicts(tmp_path, "vllm") == {"alpha_pattern": "unknown", "rank_pattern": "unknown"}
    assert verdicts(tmp_path, "llamacpp") == {"alpha_pattern": "silent", "rank_pattern": "ok"}


def test_what_is_more_than_matrices_is_told_by_runtime(tmp_path):
    made = adapter(
        [
            lora("q", 4, 6, AdapterConfig("dora", 3, 6.0)),
            replace(lora("c", 4, 6, AdapterConfig("dora", 3, 6.0)), kernel=(1, 1)),
        ],
        replaced={"score.weight": TensorInfo("score.weight", "F32", (2, 2))},
        load=lambda _: small.torch.ones(2, 2).numpy(),
    )
    peft.write(made, tmp_path)
    assert verdicts(tmp_path, "vllm") == {
        "DoRA": "rejected", "convolutions": "unknown", "modules_to_save": "rejected",
    }  # fmt: skip
    assert verdicts(tmp_path, "llamacpp")["DoRA"] == "rejected"
    assert verdicts(tmp_path, "peft") == {
        "DoRA": "ok", "convolutions": "ok", "modules_to_save": "ok",
    }  # fmt: skip


def test_the_layout_is_told_too(tmp_path):
    (tmp_path / "kohya").mkdir()
    kohya.write(llama(), tmp_path / "kohya")
    rows = lint(tmp_path / "kohya", "vllm").rows
    assert rows[0].feature == "layout"
    assert rows[0].verdict == "rejected"
    assert rows[0].why == "the layout is kohya, and peft is read"
    assert set(verdicts(tmp_path / "kohya", "kohya").values()) == {"ok"}
    (tmp_path / "gguf").mkdir()
    gguf_lora.write(llama(), tmp_path / "gguf")
    # what the file says was baked when it was written
    assert verdicts(tmp_path / "gguf", "llamacpp") == {"rank_pattern": "ok"}
    (tmp_path / "diffusers").mkdir()
    diffusers.write(llama(), tmp_path / "diffusers")
    assert verdicts(tmp_path / "diffusers", "diffusers") == {
        "alpha_pattern": "ok", "rank_pattern": "ok",
    }  # fmt: skip


def test_a_rank_beyond_the_largest_is_rejected(tmp_path):
    peft.write(adapter([lora("a", 4, 6, AdapterConfig("lora", 600, 6.0))]), tmp_path)
    assert verdicts(tmp_path, "vllm") == {"rank": "rejected"}


def test_with_its_base_what_does_not_fit_is_told(tmp_path):
    base = small.base(tmp_path / "base")
    path = small.adapter(tmp_path / "it")
    assert verdicts(path, "peft", base) == {}
    made = adapter(
        [
            lora("model.layers.9.mlp.up_proj", small.WIDE, small.HIDDEN),
            lora("lm_head", small.VOCAB, small.HIDDEN),
        ]
    )
    peft.write(made, (tmp_path / "other").mkdir() or tmp_path / "other")
    assert verdicts(tmp_path / "other", "peft", base) == {"modules that the base lacks": "silent"}
    (base / "config.json").write_text(json.dumps(small.config(tie_word_embeddings=True)))
    assert verdicts(tmp_path / "other", "llamacpp", base) == {
        "modules that the base lacks": "rejected", "tied head": "rejected",
    }  # fmt: skip


def test_parts_that_nobody_understands_are_loaded_by_peft_without_a_word(tmp_path):
    path = small.adapter(tmp_path / "it", use_unheard_of=True)
    assert verdicts(path, "peft") == {"parts that are not understood": "silent"}


def test_json_has_every_module(tmp_path):
    path = small.adapter(tmp_path / "it", alpha_pattern={"0.self_attn.q_proj": 3.0})
    done = linted(path, "--for", "llamacpp", "--json")
    assert done.exit_code == 3
    facts = json.loads(done.stdout)
    assert facts["ok"] is False
    assert facts["features"] == [
        {
            "feature": "alpha_pattern", "verdict": "silent",
            "why": "one alpha is written for all tensors", "source": "llama.cpp/convert_lora_to_gguf.py",
            "versions": "ggml-org/llama.cpp#8332 (2024-07) to 0b03ada",
            "where": ["model.layers.0.self_attn.q_proj"],
        }
    ]  # fmt: skip


def test_an_unknown_runtime_is_answered_with_the_nearest(tmp_path):
    path = small.adapter(tmp_path / "it")
    with pytest.raises(UnknownNameError) as error:
        lint(path, "llama.cpp")
    assert str(error.value) == "--for llama.cpp: no such runtime is known. Did you mean 'llamacpp'?"


def test_every_claim_is_of_a_feature_and_names_its_source_and_versions():
    sites = [
        lora("a", 4, 6), lora("b", 4, 6), lora("c", 4, 6, AdapterConfig("lora", 2, 1.0, rank_stabilized=True)),
        lora("d", 4, 6, AdapterConfig("dora", 3, 6.0)), replace(lora("e", 4, 6), kernel=(1,)),
        lora("f", 4, 6, layout="embedding"), lora("g", 4, 6, layout="parameter"),
        lora("h", 4, 6, AdapterConfig("vera", 3, 6.0)), lora("j", 4, 6, AdapterConfig("ia3", 1, 1.0)),
        replace(lora("i.experts", 4, 6, layout="parameter"), parameter="down_proj"),
        lora("i.experts.1.down_proj", 4, 6),
    ]  # fmt: skip
    made = adapter(sites, replaced={"x.weight": None, "x.bias": None}, added={"y.bias": None})
    named = {feature.name for feature in features(made)}
    named |= {
        "layout",
        "rank",
        "tied head",
        "modules that the base lacks",
        "parts that are not understood",
    }
    for runtime, known in RUNTIMES.items():
        assert set(known.layouts) <= set(plugins.names("dialects")), runtime
        assert set(known.claims) <= named, runtime
        assert all(c.source and c.versions and c.why for c in known.claims.values()), runtime
