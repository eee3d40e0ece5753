"""`evaluate` of two encoders: the cosines that numpy finds between onnxruntime's vectors and transformers'."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoders import TEXTS, embedded, make_adapter, minilm_folder, run, states, tokens
from merging import done, surgery
from peft import PeftModel
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel

# the graphs have no pooler
ALLOWED = "--allow-unmatched", "*pooler*"
LEAST = {"fp32": 1 - 1e-6, "fp16": 0.9999, "int8": 0.999, "nf4": 0.96, "int4": 0.96}


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM in each kind of numbers, by the file's name; `merged.onnx` with an adapter in it."""
    home, minilm = tmp_path_factory.mktemp("minilm"), minilm_folder()
    for weights in ("fp32", "fp16"):
        done("export", minilm, "-o", home / weights, "--weights", weights)
        shutil.move(home / weights / "model.onnx", home / f"{weights}.onnx")
    for weights in ("int8", "nf4", "int4"):
        done("quantize", home / "fp32.onnx", "-o", home / f"{weights}.onnx", "--weights", weights)
    adapter = make_adapter(minilm, home / "adapter")
    done("merge", home / "fp32.onnx", adapter, "-o", home / "merged.onnx", *ALLOWED)
    (home / "text").write_text("\n\n".join(TEXTS))
    return home


def compared(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done("evaluate", *arguments, "--json").stdout)
    return found


@pytest.mark.parametrize("weights", LEAST)
def test_the_cosine_of_minilm_in_each_kind_of_numbers_is_numpys(
    exports: Path, weights: str
) -> None:
    minilm, file = minilm_folder(), exports / f"{weights}.onnx"
    found = compared(minilm, file, "--text", exports / "text")
    feeds = tokens(minilm)
    mask = feeds["attention_mask"]
    want = embedded(states(AutoModel.from_pretrained(minilm), feeds), mask)
    cosines = (want * embedded(run(file, feeds).astype(np.float64), mask)).sum(axis=1)
    assert found["cosine"] == pytest.approx(cosines.mean(), abs=1e-6)
    assert found["worst"] == pytest.approx(cosines.min(), abs=1e-6)
    assert found["worst"] > LEAST[weights]
    assert (found["runtime"], found["other_runtime"]) == ("transformers", "onnxruntime")
    if weights != "fp32":
        assert found["worst_text"] == TEXTS[int(cosines.argmin())]
        assert found["cosine"] < 1 - 1e-9


def test_a_merged_adapter_is_the_model_with_the_adapter_and_not_without(exports: Path) -> None:
    minilm, merged = minilm_folder(), exports / "merged.onnx"
    beside = compared(minilm, merged, "--adapter", exports / "adapter", "--text", exports / "text")
    assert beside["worst"] > 1 - 1e-6
    without = compared(minilm, merged, "--text", exports / "text")
    feeds = tokens(minilm)
    mask = feeds["attention_mask"]
    with_it = PeftModel.from_pretrained(
        AutoModel.from_pretrained(minilm), exports / "adapter"
    ).merge_and_unload()
    base = embedded(states(AutoModel.from_pretrained(minilm), feeds), mask)
    cosines = (base * embedded(states(with_it, feeds), mask)).sum(axis=1)
    assert without["cosine"] == pytest.approx(cosines.mean(), abs=1e-5)
    assert without["cosine"] < 0.999


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer, with MiniLM's tokenizer."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=30522, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("small") / "base"
    BertModel(config).save_pretrained(folder)
    copy_tokenizer(folder)
    return folder


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(minilm_folder() / name, folder / name)


def test_an_adapter_that_is_an_input_is_its_merged_model(small: Path, tmp_path: Path) -> None:
    """Of an encoder too: ranks differ, and one adapter's directory is called as the file that is written."""
    out, text = tmp_path / "out", tmp_path / "text"
    text.write_text("\n".join(TEXTS))
    folders = [make_adapter(small, tmp_path / n, r) for n, r in (("adapter", 4), ("other", 6))]
    named = [flag for folder in folders for flag in ("-a", folder)] + [*ALLOWED]
    done("export", small, "-o", out, "--adapters-as-inputs", *named)
    feeds = tokens(small)
    for folder in folders:
        merged = PeftModel.from_pretrained(AutoModel.from_pretrained(small), folder)
        merged.merge_and_unload().save_pretrained(tmp_path / f"{folder.name}-merged")
        want = states(AutoModel.from_pretrained(tmp_path / f"{folder.name}-merged"), feeds)
        got = switched(out, folder.name, feeds)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
        found = compared(
            out, tmp_path / f"{folder.name}-merged", "--adapter", folder.name, "--text", text
        )
        assert (found["model"], found["worst"] > 1 - 1e-6) == (f"{out} + {folder.name}", True)
    crossed = compared(out, tmp_path / "other-merged", "--adapter", "adapter", "--text", text)
    assert crossed["worst"] < 1 - 1e-5


def switched(folder: Path, name: str, feeds: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(folder / "model.onnx")
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    adapter, how = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(folder / "adapters" / f"{name}.onnx_adapter"))
    how.add_active_adapter(adapter)
    return session.run(None, feeds, how)[0]


def test_the_page_names_both_and_the_worst_text(exports: Path) -> None:
    models = minilm_folder(), exports / "int4.onnx"
    numbers = compared(*models, "--text", exports / "text")
    assert done("evaluate", *models, "--text", exports / "text").stdout.splitlines() == [
        "texts                          3",
        f"model                          {models[0]} (transformers)",
        f"other                          {models[1]} (onnxruntime)",
        f"cosine of their outputs, mean  {numbers['cosine']:.6f}",
        f"worst                          {numbers['worst']:.6f}, of {numbers['worst_text'][:60]!r}",
    ]


def test_a_classifier_is_compared_by_its_logits_and_nf4_runs_without_bitsandbytes(
    small: Path,
    tmp_path: Path,
) -> None:
    config = BertConfig.from_pretrained(small, num_labels=3)
    torch.manual_seed(2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    copy_tokenizer(tmp_path / "base")
    done("quantize", tmp_path / "base", "-o", tmp_path / "nf4")
    done("dequantize", tmp_path / "nf4", "-o", tmp_path / "plain", "--dtype", "float32")
    (tmp_path / "text").write_text("\n".join(TEXTS))
    found = compared(tmp_path / "base", tmp_path / "nf4", "--text", tmp_path / "text")
    feeds = tokens(minilm_folder())
    one, two = (
        states(BertForSequenceClassification.from_pretrained(tmp_path / name), feeds)
        for name in ("base", "plain")
    )
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    assert found["cosine"] == pytest.approx(((one * two).sum(axis=1) / lengths).mean(), abs=1e-5)


# --- errors


def refused(*arguments: object) -> tuple[int, str]:
    result = surgery(*arguments)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_what_an_encoder_cannot_do_is_one_error(exports: Path, tmp_path: Path) -> None:
    minilm, text = minilm_folder(), ("--text", exports / "text")
    for model in (minilm, exports / "nf4.onnx"):
        assert refused("generate", model, "Hello") == (
            1,
            f"error: {model}: is an encoder, which goes on with no text. See what it makes of one with "
            "`lorasurgery evaluate A B --text FILE`.\n",
        )  # fmt: skip
    assert refused("evaluate", minilm, *text) == (
        2,
        f"error: {minilm}: is an encoder, which predicts no text. Name another beside it.\n",
    )
    assert refused("evaluate", minilm, minilm, *text, "--runtime", "genai") == (
        2, f"error: --runtime genai: {minilm} is an encoder for transformers. Take it away.\n",
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert refused("evaluate", minilm, tmp_path, *text) == (
        1, f"error: {tmp_path}: is no encoder, and the other is. Compare like with like.\n",
    )  # fmt: skip
    (tmp_path / "empty").write_text("\n \n")
    assert refused("evaluate", minilm, exports / "nf4.onnx", "--text", tmp_path / "empty") == (
        1,
        "error: the text has no line that is not empty: nothing can be compared. Give more.\n",
    )
