"""Exports of one base on one text: perplexity, and how far each is from the base, in its own runtime.

`python -m benchmarks.gguf BASE TEXT`, BASE a 16-bit or float32 directory of a Llama family. NF4 runs in transformers with
bitsandbytes, GGUF in llama.cpp where llama-cpp-python is installed, else decoded in transformers: the table says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.decode import say, size
from benchmarks.processes import run
from benchmarks.racing import OURS

KINDS = ("f16", "q8_0", "q4_0", "q4_1")


@dataclass(frozen=True, slots=True)
class _Made:
    """An export with what making it cost; nothing for the base."""

    name: str
    path: Path
    seconds: float = 0.0
    peak_mib: float = 0.0


def exports(base: Path, scratch: Path) -> list[_Made]:
    """NF4 and each GGUF type."""
    flags = {"nf4": ("--to", "transformers", "--weights", "nf4")}
    flags |= {f"gguf {kind}": ("--to", "gguf", "--type", kind) for kind in KINDS}
    made = []
    for name, how in flags.items():
        out = scratch / name.replace(" ", "-")
        done = run((*OURS, "export", base, "-o", out, "--overwrite", *how))
        made.append(_Made(name, out, done.seconds, done.peak_mib))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="a model directory")
    parser.add_argument("text", type=Path, help="UTF-8")
    parser.add_argument("--scratch", type=Path, default=Path("bench-out/gguf"))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    made = exports(options.base, options.scratch)
    say(
        "| what | runtime | perplexity | KL from the base | same first choice | MiB | export s | peak MiB |"
    )
    say("|---|---|--:|--:|--:|--:|--:|--:|")
    first = True
    for one in made:
        done = run((*OURS, "evaluate", options.base, one.path, "--text", options.text, "--json"))
        found = json.loads(done.stdout)
        if first:
            weight = size(options.base)
            say(f"| base | {found['runtime']} | {found['perplexity']:.3f} | | | {weight:.0f} | | |")
            print(f"{found['tokens']} tokens", file=sys.stderr)
        first = False
        say(
            f"| {one.name} | {found['other_runtime']} | {found['other_perplexity']:.3f} | "
            f"{found['divergence']:.5f} | {100 * found['agreement']:.2f} % | {size(one.path):.0f} | "
            f"{one.seconds:.1f} | {one.peak_mib:.0f} |"
        )


if __name__ == "__main__":
    main()
