"""Exports of one base, each in its own runtime: perplexity on one text, distance from the base, greedy text.

`python -m benchmarks.exports BASE [--text FILE]`, BASE a directory of a Llama family in float32. GGUF runs in llama.cpp
where llama-cpp-python is installed, else decoded in transformers: the table says which. Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.export_rows import genai_int4
from benchmarks.processes import run
from benchmarks.racing import OURS
from benchmarks.run import HERE, say

TEXT = HERE / "texts" / "moby-dick.txt"
RESULT = HERE / "results" / "exports.json"
GENAI = "onnxruntime-genai's own int4"
EXPORTS: Mapping[str, tuple[str, ...]] = {
    "NF4": ("--to", "transformers", "--weights", "nf4"),
    **{f"ONNX {w}": ("--weights", w) for w in ("fp32", "nf4", "int8", "int4")},
    "ONNX int4, zero points": ("--weights", "int4", "--zero-points"),
    GENAI: (),
    **{f"GGUF {kind}": ("--to", "gguf", "--type", kind) for kind in ("f16", "q8_0", "q4_0", "q4_1")},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One export: what making it took, and how it does on the text; nothing was made of the base."""

    name: str
    runtime: str
    perplexity: float
    mib: float
    divergence: float | None = None  # KL from the base, nats a token
    agreement: float | None = None
    seconds: float | None = None
    peak_mib: float | None = None


def size(folder: Path) -> float:
    """MiB of a folder's files."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / (1 << 20)


def measure(base: Path, text: Path, scratch: Path, name: str) -> tuple[Measured, Measured]:
    """The base, and an export of it that is made now."""
    out = scratch / re.sub(r"\W+", "-", name.lower())
    made = run(_command(name, base, out))
    found = json.loads(run((*OURS, "evaluate", base, out, "--text", text, "--json")).stdout)
    say(f"{name}: {found['tokens']} tokens, perplexity {found['other_perplexity']:.3f}")
    return Measured("base", found["runtime"], found["perplexity"], size(base)), Measured(
        name, found["other_runtime"], found["other_perplexity"], size(out), found["divergence"],
        found["agreement"], made.seconds, made.peak_mib,
    )  # fmt: skip


def _command(name: str, base: Path, out: Path) -> tuple[str | Path, ...]:
    """What makes an export."""
    if name == GENAI:
        shutil.rmtree(out, ignore_errors=True)
        return genai_int4(base, out)
    if name == "ONNX nf4":
        # the same codes: scales are rounded where an NF4 directory is written, and nowhere else
        packed = out.with_name("nf4")
        run((*OURS, "export", base, "-o", packed, "--overwrite", *EXPORTS["NF4"]))
        base = packed
    return (*OURS, "export", base, "-o", out, "--overwrite", *EXPORTS[name])


def table(rows: list[Measured]) -> str:
    """Markdown."""
    lines = [
        "| what | runtime | perplexity | KL from the base | same first choice | MiB | export s | peak MiB |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        far = cost = " | "
        if row.divergence is not None and row.agreement is not None:
            far = f"{row.divergence:.5f} | {100 * row.agreement:.1f} %"
        if row.seconds is not None:
            cost = f"{row.seconds:.1f} | {row.peak_mib:.0f}"
        lines.append(
            f"| {row.name} | {row.runtime} | {row.perplexity:.3f} | {far} | {row.mib:.0f} | {cost} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, help="a model directory")
    parser.add_argument("--text", type=Path, default=TEXT, help="UTF-8")
    parser.add_argument("--only", action="append", choices=EXPORTS, help="may be repeated")
    parser.add_argument("--scratch", type=Path, default=Path("bench-out/exports"))
    parser.add_argument("--output", type=Path, default=RESULT, help="where the JSON goes")
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    rows: list[Measured] = []
    for name in options.only or EXPORTS:
        base, made = measure(options.base, options.text, options.scratch, name)
        rows += [made] if rows else [base, made]
    greedy = json.loads(
        run((sys.executable, "-m", "benchmarks.greedy", options.base, options.scratch)).stdout
    )
    print(table(rows))
    content = {"text": options.text.name, "rows": [asdict(row) for row in rows], "greedy": greedy}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    say(f"wrote {options.output}")


if __name__ == "__main__":
    main()
