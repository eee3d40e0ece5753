"""SmolLM2 through ONNX: the greedy text of its NF4 export is bitsandbytes', and its int4 stays near."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import numpy as np
import onnx
import pytest
import torch
from merging import done
from transformers import AutoModelForCausalLM

from lorasurgery.operations.running import by_genai, by_onnxruntime
from lorasurgery.operations.running.model import encode

# what the NF4 model goes on with, greedily, 64 tokens each; written by transformers from its dequantized
# weights. A text is greedy if each token has the highest score after those before it: no model has to write
# it again, token by token, to show that it would.
TEXTS = {
    "The history of Rome begins with": (
        " the Romans, who were Romans, and ended with the Romans, who are Romans.\n\nThe answer "
        "to this question is that the Romans are Romans.\n\nThis answer is based on the Latin ph"
        'rase "LITTRACI", which translates to "Liber" and means "Liberus" or "'
    ),
    "Water boils at": (
        " around 1000 degrees Celsius.\n\nThe next step is to analyze the data to determine if t"
        "here is a correlation between the amount of time spent watching TV and the correspond"
        "ing increase in blood pressure. This can be done by using statistical methods to calc"
        "ulate the correlation coefficient, which measures the strength of the linear relation"
        "ship"
    ),
    "def fibonacci(n):": (
        "\n    fibonacci(n)\n    return fibonacci(n)\n\ndef fibonacci(n):\n    return fibonacci(n)\n"
        "\nprint(fibonacci(10))\n```\n\nIn this code, we use recursion to calculate the Fibonacci "
        "sequence up to 10 Fibonacci numbers"
    ),
    "Dear Sir or Madam,": (
        " I'm so glad to have you on board.\n\nI'll be happy to take you to the beach and to the"
        " local market. I'll also be taking you to the market, and I'll be taking you to the m"
        "arket, and I'll be taking you to the market, and I'll be taking you"
    ),
    "The three primary colours are": (
        " the primary (red), secondary (blue), and tertiary (green). These are the primary col"
        "ours, which are the purest of the three, and are used to create the other two primary"
        " colours.\n\nThe other two primary colours are the secondary (blue), and the tertiary ("
        "green). These are used to create"
    ),
}
COUNT, END = 64, 2


@pytest.fixture(scope="session")
def base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "base"
    # transformers takes the dtype of bitsandbytes' products from it
    done("convert-checkpoint", smollm2, "-o", out, "--dtype", "float32")
    return out


@pytest.fixture(scope="session")
def nf4(base: Path) -> tuple[Path, Path]:
    """The NF4 directory, and its export."""
    home = base.parent
    done("quantize", base, "-o", home / "nf4")
    done("export", home / "nf4", "-o", home / "nf4-onnx", "--weights", "nf4")
    onnx.checker.check_model(home / "nf4-onnx" / "model.onnx")
    return home / "nf4", home / "nf4-onnx"


@pytest.fixture(scope="session")
def by_bitsandbytes(nf4: tuple[Path, Path]) -> torch.nn.Module:
    """In float32: its own kernel for CPUs with AVX512-BF16 rounds to bfloat16, whatever is asked."""
    model = AutoModelForCausalLM.from_pretrained(nf4[0], dtype=torch.float32).eval()
    products = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    for module in products:
        module.support_avx512bf16_for_cpu = False
        assert module.weight.quant_state.dtype == torch.float32
    assert len(products) == 7 * 30
    assert model.lm_head.weight.dtype == torch.float32
    return model


def test_64_greedy_tokens_of_5_prompts_are_bitsandbytes(
    nf4: tuple[Path, Path], by_bitsandbytes: torch.nn.Module
) -> None:
    ours = by_onnxruntime.load(nf4[1])
    for prompt, continued in TEXTS.items():
        begin, text = encode(ours, prompt), encode(ours, prompt + continued)
        made = text[len(begin) :]
        assert len(made) == COUNT
        with torch.no_grad():
            theirs = by_bitsandbytes(torch.from_numpy(text)[None]).logits[0].numpy()
        after = slice(len(begin) - 1, len(text) - 1)
        theirs, found = theirs[after], ours.logits(text)[after]
        # nor does a text end before its 64 tokens: transformers' min_new_tokens
        theirs[:, END] = found[:, END] = -100
        np.testing.assert_array_equal(theirs.argmax(-1), made)
        gaps = np.diff(np.sort(theirs, axis=-1)[:, -2:])[:, 0]
        apart = np.flatnonzero(found.argmax(-1) != made)
        assert not len(apart), f"{prompt}: token {apart[0]}, gap {gaps[apart[0]]:.5f}"
        assert np.abs(found - theirs).max() < 2e-3


def test_the_cache_makes_the_same_text_in_both_runtimes(nf4: tuple[Path, Path]) -> None:
    ours, genai = by_onnxruntime.load(nf4[1]), by_genai.load(nf4[1])
    prompt = encode(ours, "Water boils at")
    text = ours.complete(prompt, 4)
    np.testing.assert_array_equal(genai.complete(prompt, 4), text)
    whole = ours.logits(np.concatenate([prompt, text]))
    np.testing.assert_array_equal(whole[len(prompt) - 1 : -1].argmax(-1), text)
