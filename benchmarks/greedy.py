"""Greedy text of exports against their peers: 64 tokens after each of 5 prompts.

`python -m benchmarks.greedy BASE FOLDER`, with the exports of benchmarks.exports in FOLDER. NF4 in ONNX is held to
bitsandbytes in transformers, in float32; GGUF in llama.cpp to transformers on the weights that the file decodes to. A text
is greedy for the peer if each of its tokens has the peer's highest score after those before it. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.run import say
from lorasurgery.operations.running.model import LanguageModel, encode, load

TOKENS = 64
PROMPTS = (
    "The history of Rome begins with",
    "Water boils at",
    "def fibonacci(n):",
    "Dear Sir or Madam,",
    "The three primary colours are",
)


def pairs(base: Path, folder: Path) -> Iterator[tuple[str, LanguageModel, LanguageModel]]:
    """What is compared, an export and its peer, as far as they are there."""
    if (folder / "onnx-nf4").exists() and (folder / "nf4").exists():
        peer = in_float32(load(folder / "nf4", "transformers"))
        yield "ONNX nf4 : transformers + bitsandbytes", load(folder / "onnx-nf4"), peer
    if (folder / "onnx-fp32").exists():
        yield "ONNX fp32 : transformers", load(folder / "onnx-fp32"), load(base, "transformers")
    for kind in ("f16", "q8_0", "q4_1") if find_spec("llama_cpp") else ():
        if (file := folder / f"gguf-{kind}").exists():
            yield f"GGUF {kind} : transformers", load(file, "llamacpp"), load(file, "transformers")


def in_float32(peer: Any) -> LanguageModel:
    """bitsandbytes' kernel for CPUs with AVX512-BF16 rounds to bfloat16, whatever is asked."""
    from bitsandbytes.nn.modules import Linear4bit

    for module in peer.loaded.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    found: LanguageModel = peer
    return found


def compare(ours: LanguageModel, peer: LanguageModel) -> list[dict[str, object]]:
    """Of each prompt: how many tokens both choose, and the peer's logit gap where they part."""
    found = []
    for prompt in PROMPTS:
        begin = encode(peer, prompt)
        made = ours.complete(begin, TOKENS)
        scores = peer.logits(np.concatenate([begin, made]))[len(begin) - 1 : -1]
        apart = np.flatnonzero(scores.argmax(-1) != made)
        same = int(apart[0]) if len(apart) else len(made)
        one: dict[str, object] = {"prompt": prompt, "made": len(made), "same": same}
        if same < len(made):
            one["gap"] = round(float(scores[same].max() - scores[same, made[same]]), 6)
        found.append(one)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="a model directory")
    parser.add_argument("folder", type=Path, help="of exports")
    options = parser.parse_args()
    found = {}
    for name, ours, peer in pairs(options.base, options.folder):
        found[name] = compare(ours, peer)
        same = sum(one["same"] == one["made"] for one in found[name])
        say(f"{name}: {same} of {len(PROMPTS)} texts are the same")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
