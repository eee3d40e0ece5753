"""SmolLM2 through ONNX in one run: decoded tokens a second, size and peak memory of exports.

`python -m benchmarks.decode BASE [--repeats N]`, BASE a 16-bit directory. Our int4 beside onnxruntime-genai's own,
our NF4 and int8 beside bitsandbytes' NF4 in transformers. Each contender decodes in a process of its own, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from benchmarks.processes import Run, run
from benchmarks.racing import OURS

PROMPT, TOKENS = "The history of Rome begins with", 64
_BUILDER = (sys.executable, "-m", "onnxruntime_genai.models.builder")


def decode(folder: Path, prompt: str, tokens: int) -> float:
    """Tokens a second of the greedy text in the folder's own runtime; the second of two texts."""
    import time

    from lorasurgery.operations.running.model import encode, load

    model = load(folder)
    begin = encode(model, prompt)
    seconds, made = 0.0, 0
    for _ in range(2):
        started = time.perf_counter()
        made = len(model.complete(begin, tokens))
        seconds = time.perf_counter() - started
    return made / seconds


def exports(base: Path, scratch: Path) -> dict[str, Run]:
    """What is compared, made once; the builder's own int4 with the options that ours has."""
    nf4, genai = scratch / "nf4", scratch / "genai-int4"
    if not nf4.exists():
        run((*OURS, "quantize", base, "-o", nf4))
    made = {}
    for weights in ("int4", "int8", "nf4"):
        out, source = scratch / weights_name(weights), base if weights == "int4" else nf4
        made[out.name] = run(
            (*OURS, "export", source, "-o", out, "--weights", weights, "--overwrite")
        )
    made[genai.name] = run(
        (
            *_BUILDER, "-i", base, "-o", genai, "-p", "int4", "-e", "cpu", "-c", scratch / "cache",
            "--extra_options", "hf_token=false", "accuracy_level=4",
        )
    )  # fmt: skip
    for name, done in made.items():
        say(f"{name}: {done.seconds:.1f} s, {done.peak_mib:.0f} MiB", sys.stderr)
    return made


def weights_name(weights: str) -> str:
    return f"lorasurgery-{weights}"


def size(folder: Path) -> float:
    """MiB of a folder's files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / (1 << 20)


def say(text: str, file: TextIO = sys.stdout) -> None:
    print(text, file=file, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="a 16-bit model directory")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("bench-out/decode"))
    parser.add_argument("--one", action="store_true", help="decode in BASE, print tokens a second")
    options = parser.parse_args()
    if options.one:
        say(f"{decode(options.base, PROMPT, TOKENS):.3f}")
        return
    options.scratch.mkdir(parents=True, exist_ok=True)
    made = exports(options.base, options.scratch)
    folders = [*(options.scratch / name for name in made), options.scratch / "nf4"]
    speeds: dict[str, list[float]] = {folder.name: [] for folder in folders}
    for _ in range(options.repeats):
        for folder in folders:
            done = run((sys.executable, "-m", "benchmarks.decode", folder, "--one"))
            speeds[folder.name].append(float(done.stdout.split()[-1]))
            say(f"{folder.name}: {speeds[folder.name][-1]:.1f} tokens/s", sys.stderr)
    report(folders, made, speeds)


def report(
    folders: Sequence[Path], made: Mapping[str, Run], speeds: Mapping[str, Sequence[float]]
) -> None:
    """The table."""
    say("| who | tokens/s | samples | size MiB | export s | export peak MiB |")
    say("|---|--:|---|--:|--:|--:|")
    for folder in folders:
        samples = speeds[folder.name]
        how = made.get(folder.name)
        cost = f"{how.seconds:.1f} | {how.peak_mib:.0f}" if how else " | "
        who = "bitsandbytes NF4 in transformers" if folder.name == "nf4" else folder.name
        say(
            f"| {who} | {statistics.median(samples):.1f} | {', '.join(f'{s:.1f}' for s in samples)} | "
            f"{size(folder):.0f} | {cost} |"
        )


if __name__ == "__main__":
    main()
