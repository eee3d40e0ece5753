"""NF4 with double quantization of a 4096 x 4096 bfloat16 tensor: ours and bitsandbytes', in one process.

The bytes are compared first. Each side has all cores: bitsandbytes by its own threads, ours as the
engine works, one tile a thread. Prints JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import torch
from bitsandbytes.functional import QuantState, quantize_4bit

from lorasurgery.arrays import Array, to_torch
from lorasurgery.codec import CodecOptions, Packed, Rule
from lorasurgery.codecs import nf4
from lorasurgery.kernels import double_quantize
from lorasurgery.surgery import TILE_BYTES
from lorasurgery.tensors import TensorInfo

SIZE = 4096


def ours(flat: Array, packed: Packed, pool: ThreadPoolExecutor) -> tuple[Array, dict[str, Array]]:
    """Codes and the other parts."""
    step = TILE_BYTES // flat.itemsize
    starts = range(0, flat.size, step)
    tiles = list(pool.map(lambda s: nf4.encode(flat[s : s + step], packed, Rule(offset=s)), starts))
    parts, _ = nf4.seal(np.concatenate([absmax for _, absmax in tiles]), packed)
    return np.concatenate([codes for codes, _ in tiles]), parts


def theirs(weight: torch.Tensor) -> tuple[torch.Tensor, QuantState]:
    """Packed codes and their state."""
    packed: tuple[torch.Tensor, QuantState] = quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return packed


def check(codes: Array, parts: dict[str, Array], peer: tuple[torch.Tensor, QuantState]) -> None:
    """Every byte, and the offset."""
    packed, state = peer
    offset = json.loads(bytes(parts[".quant_state.bitsandbytes__nf4"]))["nested_offset"]
    assert np.array_equal(codes, packed.flatten().numpy())
    assert np.array_equal(parts[".absmax"], state.absmax.numpy())
    assert np.array_equal(parts[".nested_absmax"], state.state2.absmax.numpy())
    assert offset == state.offset.item()


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    repeats = int(sys.argv[1])
    drawn = np.random.default_rng(0).standard_normal((SIZE, SIZE), dtype=np.float32)
    weight = (drawn * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    packed = nf4.parts(TensorInfo("w.weight", "BF16", weight.shape), CodecOptions())
    flat, tensor = weight.reshape(-1), to_torch(weight)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        # the last bit of their offset depends on how many threads sum; ours is that of two
        threads = torch.get_num_threads()
        torch.set_num_threads(double_quantize.THREADS)
        check(*ours(flat, packed, pool), theirs(tensor))  # also warms both
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(repeats):
            times["ours"].append(seconds(lambda: ours(flat, packed, pool)))
            times["peer"].append(seconds(lambda: theirs(tensor)))
    print(json.dumps(times))


if __name__ == "__main__":
    main()
