"""Bytes that a forward pass keeps for the backward pass: LoRA, LoRA-FA and the frozen model, 4 x 256 tokens.

Zhang et al. 2023 (LoRA-FA), arXiv 2308.03303, tell of all memory; here both are told, all of it and the adapter's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import smollm2
from benchmarks.processes import run
from benchmarks.racing import OURS
from benchmarks.run import HERE, SCRATCH

TARGETS = {"q, v": ("q_proj", "v_proj"), "all linear": ()}
RANKS = (8, 64)


def rows(base: Path, data: Path, length: int) -> list[dict[str, float | str]]:
    """LoRA-FA's own report, which says what LoRA keeps; nothing is trained."""
    found: list[dict[str, float | str]] = []
    for name, modules in TARGETS.items():
        for rank in RANKS:
            flags = [word for module in modules for word in ("--target-modules", module)]
            asked = (
                "-m",
                "lora-fa",
                "--rank",
                rank,
                "--batch",
                4,
                "--length",
                length,
                "--device",
                "cpu",
            )
            command = (
                "train",
                base,
                "--data",
                data,
                *asked,
                *flags,
                "--mem-report",
                "--dry-run",
                "--json",
            )
            done = run(tuple(str(word) for word in (*OURS, *command)))
            total = json.loads(done.stdout)["total"]
            told = {k: v for k, v in total.items() if k.startswith("saved_bytes")}
            found.append({"targets": name, "rank": rank, **told})
    return found


def table(found: list[dict[str, float | str]]) -> str:
    """Markdown, in MiB."""
    head = "| targets | r | LoRA | LoRA-FA | frozen model | FA / LoRA | of the adapter, LoRA | LoRA-FA |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for row in found:
        lora, fa, alone, own, fa_own = (
            float(row[f"saved_bytes{what}"]) / 2**20
            for what in ("_as_lora", "", "_of_base", "_of_lora_adapter", "_of_adapter")
        )
        lines.append(
            f"| {row['targets']} | {row['rank']} | {lora:.1f} | {fa:.1f} | {alone:.1f} | {fa / lora:.2f} | "
            f"{own:.1f} | {fa_own:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="another model than SmolLM2-135M")
    parser.add_argument("--data", type=Path, default=HERE.parent / "LICENSE", help="text")
    parser.add_argument("--length", type=int, default=256, help="tokens of each of 4 examples")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "saved-activations.json")
    options = parser.parse_args()
    base = options.base or smollm2.base(SCRATCH)
    data = options.output.with_suffix(".txt")
    try:
        data.write_bytes(options.data.read_bytes())  # a name that says that it is text
        found = rows(base, data, options.length)
    finally:
        data.unlink(missing_ok=True)
    print(table(found))
    smollm2.write(
        options.output, {"model": base.name, "tokens": [4, options.length], "rows": found}
    )


if __name__ == "__main__":
    main()
