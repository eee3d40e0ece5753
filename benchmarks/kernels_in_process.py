"""One CPU kernel beside its peers, in one process, warm, in turns: prints each one's seconds as JSON.

The results are held to each other first. All sides have as many threads; ours work as the engine does, a
tile a thread, but for the matvec, which spreads its rows itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import torch

from benchmarks.matmul_bnb4 import session
from lorasurgery.arrays import Array, to_torch
from lorasurgery.kernels import lora_merge, nf4_dequantize, nf4_matvec, nf4_quantize
from lorasurgery.kernels.nf4_dequantize import NF4

SIZE, BLOCK, TILE = 4096, 64, 1 << 19  # weights a tile
THREADS = len(os.sched_getaffinity(0))
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Sides = dict[str, Callable[[], Any]]


def drawn(*shape: int) -> Array:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def dequantize(pool: ThreadPoolExecutor) -> Sides:
    """NF4 to bfloat16, the same bytes."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    n = SIZE * SIZE
    weight = to_torch((drawn(SIZE, SIZE) * np.float32(0.02)).astype(BFLOAT16))
    packed, state = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    codes, absmax = packed.flatten().numpy(), state.absmax.numpy()

    def tile(start: int) -> Array:
        part = (
            slice(start // 2, (start + TILE) // 2),
            slice(start // BLOCK, (start + TILE) // BLOCK),
        )
        return nf4_dequantize.run(codes[part[0]], absmax[part[1]], BLOCK, TILE, BFLOAT16, NF4)

    def ours() -> list[Array]:
        return list(pool.map(tile, range(0, n, TILE)))

    def theirs() -> torch.Tensor:
        return dequantize_4bit(packed, state)

    assert torch.equal(to_torch(np.concatenate(ours())).view(SIZE, SIZE), theirs())
    return {"lorasurgery": ours, "bitsandbytes": theirs}


def merge(pool: ThreadPoolExecutor) -> Sides:
    """W + B A of rank 16 in bfloat16, against nothing but copying W."""
    rows, columns = 8192, 2048
    w = (drawn(rows, columns) * np.float32(0.02)).astype(BFLOAT16)
    a, b = drawn(16, columns), drawn(rows, 16) * np.float32(1e-3)
    step = TILE // columns

    def tile(start: int) -> Array:
        return lora_merge.run(w[start : start + step], a, b[start : start + step], BFLOAT16)[0]

    def ours() -> list[Array]:
        return list(pool.map(tile, range(0, rows, step)))

    def copy() -> list[Array]:
        return list(pool.map(lambda s: w[s : s + step].copy(), range(0, rows, step)))

    merged, exact = np.concatenate(ours()).astype(np.float32), w.astype(np.float64) + b @ a
    # bfloat16's rounding, and float32's of the sum before it
    assert (np.abs(merged - exact) <= 2.0**-8 * np.abs(exact) + 1e-6).all()
    return {"lorasurgery": ours, "copying W": copy}


def matvec(_: ThreadPoolExecutor) -> Sides:
    """One row times an NF4 weight: bitsandbytes both as it is and as it repacks a layer for AVX512-BF16."""
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import modules

    w, x = drawn(SIZE, SIZE) * np.float32(0.02), drawn(1, SIZE)
    codes, absmax = nf4_quantize.run(w.reshape(-1), BLOCK)
    packed, state = quantize_4bit(to_torch(w), blocksize=BLOCK, quant_type="nf4")
    onnx = session(codes, absmax, (SIZE, SIZE), BLOCK, THREADS)
    bnb: Any = modules  # it has no types
    layer = bnb.Linear4bit(
        SIZE, SIZE, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )  # fmt: skip
    layer.weight = bnb.Params4bit(
        to_torch(w), requires_grad=False, compress_statistics=False, quant_type="nf4"
    )
    layer.to("cpu").eval()
    row, short = to_torch(x), x.astype(BFLOAT16)
    sides: Sides = {
        "lorasurgery": lambda: nf4_matvec.run(x, codes, absmax, BLOCK, SIZE, NF4),
        "lorasurgery, bfloat16": lambda: nf4_matvec.run(short, codes, absmax, BLOCK, SIZE, NF4),
        "bitsandbytes matmul_4bit": lambda: matmul_4bit(row, packed.t(), state).numpy(),
        "bitsandbytes Linear4bit, bfloat16": lambda: layer(row.bfloat16()).float().numpy(),
        "ONNX Runtime MatMulBnb4": lambda: onnx.run(None, {"x": x})[0],
    }
    kind = np.dtype(np.float32)
    decoded = nf4_dequantize.run(codes, absmax, BLOCK, w.size, kind, NF4).reshape(w.shape)
    exact = x.astype(np.float64) @ decoded.T.astype(np.float64)
    for name, side in sides.items():
        # float32 sums of 4096 terms; bfloat16 rounds the operands and the result
        near = 2.0**-5 if "bfloat16" in name else 1e-4
        assert np.abs(side().astype(np.float64) - exact).max() <= near * np.abs(exact).max(), name
    return sides


KERNELS = {"dequantize": dequantize, "merge": merge, "matvec": matvec}


def main() -> None:
    name, repeats = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(THREADS)
    with torch.no_grad(), ThreadPoolExecutor(THREADS) as pool:
        sides = KERNELS[name](pool)
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(repeats):
            for side, call in sides.items():
                started = time.perf_counter()
                call()
                times[side].append(time.perf_counter() - started)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
