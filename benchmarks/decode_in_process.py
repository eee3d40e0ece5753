"""Greedy text of one model in the runtime that it is for, or in transformers, in a fresh process. Prints JSON.

What `generate` runs, given the same tokens on every side; a few tokens are made first, untimed. The scores after those that are
given go into a file, for the sides to be compared.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from lorasurgery.arrays import Array
from lorasurgery.operations.running.by_transformers import ByTransformers
from lorasurgery.operations.running.model import LanguageModel, load

GIVEN, WARM, TIMED = 8, 2, 16


def tokens(vocabulary: int) -> Array:
    """The same for every side."""
    return np.random.default_rng(0).integers(2, vocabulary, GIVEN)


def loaded(folder: Path, dtype: str | None) -> LanguageModel:
    """With `dtype`, in transformers."""
    if dtype is None:
        return load(folder)
    from lorasurgery.operations import _language_model

    return ByTransformers(_language_model.load(folder, dtype))


def seconds(model: LanguageModel, given: Array) -> float:
    """Of so many tokens, what was given being read first; of more than came, where the model ends its text early."""
    model.complete(given, WARM)
    started = time.perf_counter()
    made = len(model.complete(given, TIMED))
    return (time.perf_counter() - started) * TIMED / made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("scores", type=Path, help="a .npy file to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="in transformers, in it")
    options = parser.parse_args()
    model = loaded(options.model, options.dtype)
    given = tokens(model.vocabulary)
    np.save(options.scores, model.logits(given)[-1])
    print(json.dumps({"runtime": model.runtime, "seconds": seconds(model, given)}))


if __name__ == "__main__":
    main()
