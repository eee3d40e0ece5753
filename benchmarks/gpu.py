"""On a machine with a GPU: our kernels beside bitsandbytes, an unsloth-like LoRA, and dense torch.

    python -m benchmarks.gpu

First every kernel is held to its definition (`lorasurgery doctor --self-test`), and every side of the table to its
plainest one. Then it prints a table of microseconds, the last rows of which go from file to file in processes of
their own, and writes benchmarks/results/gpu-DEVICE.json. Without a GPU there is nothing to measure.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_files
from benchmarks.gpu_layer import Sides, layer
from benchmarks.gpu_rows import benches
from benchmarks.racing import Row, Side
from benchmarks.run import PEERS, SCRATCH, installed
from lorasurgery.operations.diagnosis.self_test import SelfTest, self_test

RESULTS = Path(__file__).with_name("results")
SIZE = 8192
FILES = 3  # runs of what takes seconds
# larger than any last-level cache, so that each call finds its weights in memory
FLUSHED = 512 << 20


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
    w, flush = layer(SIZE, "cuda"), torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
    rows = []
    with torch.no_grad():
        for name, make in benches(SIZE).items():
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


def record(rows: list[Row], device: str, tested: SelfTest) -> dict[str, object]:
    """All samples, and where they were taken."""
    return {
        "device": device,
        "cuda": torch.version.cuda,
        "versions": {n: found for n in (*PEERS, "triton") if (found := installed(n))},
        "self_test": asdict(tested),
        "rows": [
            {"name": r.name, "sides": [{"name": s.name, "seconds": s.seconds} for s in r.sides]}
            for r in rows
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where models are made")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device = torch.cuda.get_device_name()
    tested = self_test()
    tested.refuse_wrong()
    rows = bench(options.repeats) + gpu_files.rows(options.scratch, FILES)
    print(f"{device}\n\n{table(rows)}")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    output = options.output or RESULTS / f"gpu-{slug}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record(rows, device, tested), indent=1) + "\n")


if __name__ == "__main__":
    main()
