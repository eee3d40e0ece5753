"""One square weight's change made smaller: ours and torch.linalg.svd of the whole matrix, in one process.

prune: the change is a LoRA of rank 64, cut to 16; ours works on factors. extract: the change of a bfloat16
weight is found again at rank 16, as extraction scripts do with a whole SVD. Errors are compared first:
ours may be larger by a thousandth. Each side has all cores. Prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from lorasurgery.arrays import Array
from lorasurgery.operations.algebra.nearest import Aim, nearest
from lorasurgery.operations.algebra.svd import of_product

RANK, FULL = 16, 64

Pair = tuple[Array, Array]


def factors(size: int) -> Pair:
    """A LoRA whose singular values fall slowly: A [64, size], B [size, 64]."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((FULL, size), (size, FULL)))
    falling = (1 + np.arange(FULL, dtype=np.float32)) ** np.float32(-0.5)
    return a, b * falling * np.float32(1e-4)


def tuned(size: int, a: Array, b: Array) -> Array:
    """W' - W [size, size] of bfloat16 weights: the LoRA's change, and what rounding made of it."""
    drawn = np.random.default_rng(1).standard_normal((size, size), dtype=np.float32)
    w = (drawn * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    after = (w.astype(np.float32) + b @ a).astype(ml_dtypes.bfloat16)
    change: Array = after.astype(np.float32) - w.astype(np.float32)
    return change


def whole_svd(delta: torch.Tensor) -> Pair:
    """The best of rank 16, by all singular triplets."""
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    half = s[:RANK].sqrt()
    return (half[:, None] * vt[:RANK]).numpy(), (u[:, :RANK] * half).numpy()


def check(delta: Array, ours: Pair, theirs: Pair) -> None:
    """Ours is as near as the best, or nearly."""
    errors = [float(np.linalg.norm(delta - b @ a)) for a, b in (ours, theirs)]
    assert errors[0] <= 1.001 * errors[1], errors


def race(
    delta: Array, ours: Callable[[], Pair], theirs: Callable[[], Pair], repeats: int
) -> object:
    """Both sides' seconds, one after the other."""
    check(delta, ours(), theirs())
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(repeats):
        for name, run in (("ours", ours), ("peer", theirs)):
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    repeats, size = int(sys.argv[1]), int(sys.argv[2])
    a, b = factors(size)
    of_lora, of_weights = b @ a, tuned(size, a, b)
    product, difference = torch.from_numpy(of_lora), torch.from_numpy(of_weights)
    found = {
        "prune": race(
            of_lora, lambda: of_product(a, b).factors(RANK), lambda: whole_svd(product), repeats
        ),
        "extract": race(
            of_weights, lambda: nearest(of_weights, Aim(RANK))[:2], lambda: whole_svd(difference), repeats
        ),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
