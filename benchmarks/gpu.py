"""On a machine with a GPU: our kernels beside bitsandbytes, an unsloth-like LoRA, and dense torch.

    python -m benchmarks.gpu

Prints a table of microseconds, and writes benchmarks/results/gpu-DEVICE.json. Every side's result is held
to the dense one before it is timed. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.racing import Row, Side
from benchmarks.run import PEERS, installed
from lorasurgery import plugins

RESULTS = Path(__file__).with_name("results")
OUT, IN, BLOCK, RANK, SCALE = 8192, 8192, 64, 16, 2.0
ROWS = (1, 16, 512, 8192)
# larger than any last-level cache, so that each call finds its weights in memory
FLUSHED = 512 << 20

Sides = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, slots=True)
class Layer:
    """One weight in all its forms; `state` is bitsandbytes' own."""

    dense: Tensor  # bfloat16 [out, in], what the codes stand for
    codes: Tensor
    absmax: Tensor
    table: Tensor
    state: Any
    a: Tensor  # bfloat16 [r, in]
    b: Tensor  # bfloat16 [out, r]

    @property
    def packed(self) -> tuple[Any, ...]:
        return self.codes, self.absmax, BLOCK, OUT, self.table


def layer() -> Layer:
    """Gaussian weights, quantized by bitsandbytes without a second level."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    w = 0.02 * torch.randn(OUT, IN, device="cuda", dtype=torch.bfloat16)
    packed, state = quantize_4bit(w, blocksize=BLOCK, quant_type="nf4")
    a = torch.randn(RANK, IN, device="cuda", dtype=torch.bfloat16) / IN**0.5
    b = 0.02 * torch.randn(OUT, RANK, device="cuda", dtype=torch.bfloat16)
    codes = packed.flatten().view(torch.uint8)
    table = state.code.float()
    return Layer(dequantize_4bit(packed, state), codes, state.absmax, table, state, a, b)


def theirs(w: Layer) -> Tensor:
    """The weight as bitsandbytes' functions take it."""
    return w.codes.view(-1, 1)


def quantize(w: Layer) -> Sides:
    from bitsandbytes.functional import quantize_4bit

    run = plugins.load("kernels", "nf4_quantize").run

    def bitsandbytes() -> Tensor:
        codes: Tensor = quantize_4bit(w.dense, blocksize=BLOCK, quant_type="nf4")[0]
        return codes.flatten()

    return {"lorasurgery": lambda: run(w.dense.view(-1), BLOCK)[0], "bitsandbytes": bitsandbytes}


def dequantize(w: Layer) -> Sides:
    from bitsandbytes.functional import dequantize_4bit

    run = plugins.load("kernels", "nf4_dequantize").run
    n, kind = OUT * IN, torch.bfloat16
    return {
        "lorasurgery": lambda: run(w.codes, w.absmax, BLOCK, n, kind, w.table).view(OUT, IN),
        "bitsandbytes": lambda: dequantize_4bit(theirs(w), w.state),
        "copying the result": w.dense.clone,
    }


def linear(w: Layer, m: int) -> Sides:
    from bitsandbytes.autograd._functions import matmul_4bit

    run = plugins.load("kernels", "nf4_linear").run
    x = torch.randn(m, IN, device="cuda", dtype=torch.bfloat16)
    return {
        "lorasurgery": lambda: run(x, *w.packed),
        "bitsandbytes": lambda: matmul_4bit(x, theirs(w).t(), w.state),
        "dense torch": lambda: x @ w.dense.T,
    }


def lora_linear(w: Layer, m: int) -> Sides:
    """Unsloth's way in plain torch: dequantize the weight, one product, two thin ones added in place.

    Its `matmul_lora` does that: W is dequantized into a buffer, y = x Wᵀ, y.addmm_(x Aᵀ, s Bᵀ).
    """
    from bitsandbytes.functional import dequantize_4bit

    run = plugins.load("kernels", "lora_linear").run
    x = torch.randn(m, IN, device="cuda", dtype=torch.bfloat16)

    def unsloth_like() -> Tensor:
        y = x @ dequantize_4bit(theirs(w), w.state).T
        return y.addmm_(x @ w.a.T, w.b.T, alpha=SCALE)

    return {
        "lorasurgery": lambda: run(x, *w.packed, w.a, w.b, SCALE),
        "unsloth-like torch": unsloth_like,
        "dense torch": lambda: (x @ w.dense.T).addmm_(x @ w.a.T, w.b.T, alpha=SCALE),
    }


def dora_norm(w: Layer) -> Sides:
    run = plugins.load("kernels", "dora_norm").run
    a, b = w.a.float(), SCALE * w.b.float()
    return {
        "lorasurgery": lambda: run(w.dense, a, b),
        "dense torch": lambda: (w.dense.float() + b @ a).norm(dim=1),
    }


BENCHES: dict[str, Callable[[Layer], Sides]] = {
    f"NF4 quantize {OUT} x {IN} bf16": quantize,
    f"NF4 dequantize {OUT} x {IN} to bf16": dequantize,
    **{f"NF4 linear, {m} rows": partial(linear, m=m) for m in ROWS},
    **{f"NF4 linear + LoRA of rank {RANK}, {m} rows": partial(lora_linear, m=m) for m in ROWS},
    f"DoRA norm, rank {RANK}": dora_norm,
}


def check(sides: Sides, name: str) -> None:
    """No number on a wrong result: each side against the last, which is the plainest."""
    *others, last = sides.items()
    plain = last[1]()
    want, codes = plain.double(), plain.dtype == torch.uint8
    for who, side in others:
        got = side().double()
        assert got.shape == want.shape, f"{name}: {who} {list(got.shape)}"
        if codes:
            # a weight between two levels may go to either, by the last bit of a division
            right = (got != want).double().mean() < 1e-3
        else:
            # two roundings to bfloat16, 2^-9 each, of values and of the terms they are sums of
            right = (got - want).abs().max() <= 2.0**-7 * want.abs().max()
        assert right, f"{name}: {who} is wrong"


def seconds(side: Callable[[], Tensor], flush: Tensor, repeats: int) -> list[float]:
    """By the GPU's own clock, from a cold cache."""
    event: Any = torch.cuda.Event
    for _ in range(3):
        side()
    taken = []
    for _ in range(repeats):
        start, end = (event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        side()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1000)
    return taken


def bench(repeats: int) -> list[Row]:
    w, flush = layer(), torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    rows = []
    with torch.no_grad():
        for name, make in BENCHES.items():
            sides = make(w)
            check(sides, name)
            timed = (Side(who, seconds(side, flush, repeats)) for who, side in sides.items())
            rows.append(Row(name, tuple(timed)))
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: medians, and how many times longer each peer takes."""
    lines = ["| what | who | µs | times ours |", "|---|---|--:|--:|"]
    for row in rows:
        for i, side in enumerate(row.sides):
            times = f"{row.ratio(side):.3g}" if i else ""
            lines.append(
                f"| {'' if i else row.name} | {side.name} | {1e6 * side.median:.1f} | {times} |"
            )
    return "\n".join(lines)


def record(rows: list[Row], device: str) -> dict[str, object]:
    """All samples, and where they were taken."""
    return {
        "device": device,
        "cuda": torch.version.cuda,
        "versions": {n: found for n in (*PEERS, "triton") if (found := installed(n))},
        "rows": [
            {"name": r.name, "sides": [{"name": s.name, "seconds": s.seconds} for s in r.sides]}
            for r in rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device = torch.cuda.get_device_name()
    rows = bench(options.repeats)
    print(f"{device}\n\n{table(rows)}")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    output = options.output or RESULTS / f"gpu-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record(rows, device), indent=1) + "\n")


if __name__ == "__main__":
    main()
