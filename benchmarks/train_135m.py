"""Every method on SmolLM2-135M for a few steps of one text and one seed: counts, bytes, and what the loss was.

So few steps rank no method above another. Losses are of held-out answers; before the first step it is the same for all.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.processes import run
from benchmarks.racing import OURS
from benchmarks.run import HERE, SCRATCH, say

SELECTING = ("--steps", "4", "--sample", "0.5", "-T", "0.5")


@dataclass(frozen=True, slots=True)
class Job:
    """What is run of each method."""

    base: Path
    home: Path
    steps: int
    length: int

    @property
    def data(self) -> tuple[Path, Path]:
        return smollm2.text(self.home)

    @property
    def pace(self) -> tuple[str, ...]:
        return ("--length", str(self.length), "--batch", "4", "--seed", "0", "--device", "cpu")


def methods(job: Job) -> dict[str, tuple[str, ...]]:
    """Their flags; ranks are 8 where it is not a method's point that they are not."""
    kept, steps = job.home / "kept.json", job.steps
    settle = ("--tinit", str(steps // 5), "--tfinal", str(steps // 5))
    return {
        "lora": (),
        "lora+": ("--ratio", "16"),
        "rslora": (),
        "dora": (),
        "adalora": ("--target-r", "8", *settle),
        "vera": ("--rank", "64", "--no-save-projection"),
        "lora-fa": (),
        "lora-drop": ("--keep", str(kept)),
        "delta-lora": ("--lambda", "0.5", "--start", str(steps // 2)),
        "moral": ("--experts", "4", "--topk", "2"),
        "lora --qlora": ("--qlora",),
    }


def trained(job: Job, name: str, own: tuple[str, ...]) -> dict[str, Any]:
    """A process of its own: what it says, and what it has written."""
    data, held_out = job.data
    out = job.home / name.replace(" ", "")
    rank = () if {"--rank", "--target-r"} & set(own) else ("--rank", "8")
    flags = (
        "--steps",
        str(job.steps),
        *job.pace,
        *rank,
        *own,
        "--mem-report",
        "--json",
        "--overwrite",
    )
    command = (*OURS, "train", job.base, "--data", data, "--eval-data", held_out, "-o", out)
    done = run((*command, "-m", name.split(maxsplit=1)[0], *flags))
    total = json.loads(done.stdout)["total"]
    curve = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = {k: total[k] for k in ("modules", "trained_parameters", "base_parameters", "eval_loss")}
    more = {k: v for k, v in total.items() if k.startswith(("saved_bytes", "packed_bytes"))}
    files = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return {
        **told, **more, "adapter_bytes": files, "peak_mib": round(done.peak_mib),
        "losses": [row["loss"] for row in curve], "seconds": [row["seconds"] for row in curve],
    }  # fmt: skip


def before(job: Job) -> float:
    """The loss of the base on what is held out."""
    from lorasurgery.training import setup
    from lorasurgery.training.examples import Reading
    from lorasurgery.training.options import Held, Machine, Pace, TrainOptions

    data, held_out = job.data
    options = TrainOptions(
        "lora", (str(data),), "base", reading=Reading(job.length), pace=Pace(steps=1),
        held=Held((str(held_out),)), machine=Machine(device="cpu"),
    )  # fmt: skip
    prepared = setup.prepare(job.base, options)
    return prepared.trainer.evaluate(prepared.held_out)


def table(rows: dict[str, dict[str, Any]], loss: float) -> str:
    """Markdown, in the order of the methods."""
    lines = [
        "| method | trained | adapter MB | kept for backward MiB | peak MiB | held-out loss |",
        "|---|--:|--:|--:|--:|--:|",
        f"| (the base) | | | | | {loss:.4f} |",
    ]
    lines += [
        f"| {name} | {row['trained_parameters']:,.0f} | {row['adapter_bytes'] / 1e6:.2f} | "
        f"{row['saved_bytes'] / 2**20:.0f} | {row['peak_mib']} | {row['eval_loss']:.4f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def made(job: Job, only: list[str] | None) -> dict[str, Any]:
    """All of it; the base is held to its bytes."""
    was = smollm2.digest(job.base)
    loss = before(job)
    data, _ = job.data
    select = (
        *OURS,
        "select",
        job.base,
        "--data",
        data,
        "-o",
        job.home / "kept.json",
        "--overwrite",
    )
    run((*select, "--rank", "8", *SELECTING, *job.pace, "-q"))
    rows = {}
    for name, own in methods(job).items():
        if only is None or name in only:
            began = time.perf_counter()
            rows[name] = trained(job, name, own)
            say(f"{name}: {time.perf_counter() - began:.0f} s")
    assert smollm2.digest(job.base) == was, f"{job.base} is another one now"
    print(table(rows, loss))
    return {
        "model": job.base.name, "base_sha256": was, "steps": job.steps, "batch": 4, "length": job.length,
        "seed": 0, "loss_before": loss, "methods": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="another model than SmolLM2-135M")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example, at most")
    parser.add_argument("--only", action="append", help="a method; may be repeated")
    parser.add_argument("--scratch", type=Path, default=SCRATCH / "train-135m")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "train-135m.json")
    options = parser.parse_args()
    base = options.base or smollm2.base()
    job = Job(base, options.scratch, options.steps, options.length)
    smollm2.write(options.output, made(job, options.only))


if __name__ == "__main__":
    main()
