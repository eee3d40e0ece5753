"""Each operation beside a peer's, in the same minutes on the same machine: a table, and JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.processes import run
from benchmarks.racing import Row, Setting
from benchmarks.rows import ROWS

HERE = Path(__file__).parent
SCRATCH = HERE.parent / "bench-out"
PEERS = (
    "torch", "transformers", "bitsandbytes", "peft", "mergekit", "safetensors", "numpy", "numba",
    "onnxruntime-gpu", "onnxruntime-genai-cuda",
)  # fmt: skip


def prepare(shape: str, part: str, scratch: Path, repeats: int) -> Setting:
    """The bases and their adapters, made once and then kept."""
    models, adapters = "benchmarks.make_model", "benchmarks.make_adapter"
    base = made(scratch, shape, models, shape)
    lora = made(scratch, f"{shape}-lora", adapters, shape)
    dora = made(scratch, f"{shape}-dora", adapters, shape, "--kind", "dora")
    smaller = made(scratch, part, models, part)
    tuned = made(scratch, f"{part}-tuned", models, part, "--tuned")
    for kind in ("vera", "adalora"):
        made(scratch, f"{part}-{kind}", adapters, part, "--kind", kind)
    for model in (base, smaller, tuned):
        warm(model / "model.safetensors")
    return Setting(base, lora, dora, smaller, scratch / "runs", repeats)


def made(scratch: Path, name: str, module: str, shape: str, *options: str) -> Path:
    """A directory of this name; its weights are what is written last."""
    path = scratch / name
    if not any((path / f"{kind}.safetensors").exists() for kind in ("model", "adapter_model")):
        say(f"making {path}")
        run((sys.executable, "-m", module, shape, path, *options))
    return path


def warm(file: Path) -> None:
    """Into the page cache, so that no side pays for the disk's first read."""
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    """Markdown: medians, and how many times longer and larger each peer is."""
    lines = ["| what | who | seconds | times ours | peak MiB |", "|---|---|--:|--:|--:|"]
    for row in rows:
        for side in row.sides:
            peak = "" if side.peak is None else f"{side.peak:.0f}"
            times = "" if side is row.sides[0] else f"{row.ratio(side):.3g}"
            what = row.name if side is row.sides[0] else ""
            lines.append(f"| {what} | {side.name} | {side.median:.3f} | {times} | {peak} |")
    return "\n".join(lines)


def record(rows: list[Row], shape: str, repeats: int) -> dict[str, object]:
    """All samples, and where they were taken."""
    return {
        "model": shape,
        "repeats": repeats,
        "machine": {"processor": processor(), "cores": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "versions": {name: found for name in PEERS if (found := installed(name))},
        "rows": [
            {
                "name": row.name,
                "sides": [
                    {
                        "name": side.name,
                        "seconds": side.median,
                        "times_ours": row.ratio(side),
                        "peak_mib": side.peak,
                        "samples": {"seconds": side.seconds, "peak_mib": side.peak_mib},
                    }
                    for side in row.sides
                ],
            }
            for row in rows
        ],
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", choices=ROWS, help="a row; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a toy model: a test of the benchmark")
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where models are made")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    options = parser.parse_args()
    shape = "toy" if options.small else "llama-1b"
    default = options.scratch / "toy.json" if options.small else HERE / "results" / "cpu.json"
    part = "toy" if options.small else "llama-1b-part"
    setting = prepare(shape, part, options.scratch, options.repeats)
    rows = []
    for name in options.only or ROWS:
        say(f"running {name}")
        rows.append(ROWS[name](setting))
    print(table(rows))
    output = options.output or default
    if options.only is None or options.output or options.small:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(record(rows, shape, options.repeats), indent=1) + "\n")
        say(f"wrote {output}")


if __name__ == "__main__":
    main()
