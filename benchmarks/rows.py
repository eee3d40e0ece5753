"""The rows of the table: what is run, against what, and how the two results are held to each other."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Run, run

PEERS = Path(__file__).with_name("peers")
OURS = (sys.executable, "-m", "lorasurgery")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where the inputs lie, and how often each side runs."""

    base: Path
    adapter: Path
    dora: Path
    scratch: Path
    repeats: int


@dataclass(frozen=True, slots=True)
class Side:
    """One contender: all its samples."""

    name: str
    seconds: Sequence[float]
    peak_mib: Sequence[float] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def peak(self) -> float | None:
        return statistics.median(self.peak_mib) if self.peak_mib else None


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison; the first side is ours."""

    name: str
    sides: tuple[Side, ...]

    def ratio(self, peer: Side) -> float:
        """How many times longer the peer takes."""
        return peer.median / self.sides[0].median


@dataclass(frozen=True, slots=True)
class Contender:
    """A command to time; `output` is removed before each run."""

    name: str
    command: Sequence[str | Path]
    output: Path | None = None


def alternate(name: str, contenders: Sequence[Contender], repeats: int) -> Row:
    """A B A B ...: each in a fresh process, with what the one before it wrote flushed to disk."""
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for _ in range(repeats):
        for contender in contenders:
            if contender.output:
                shutil.rmtree(contender.output, ignore_errors=True)
            os.sync()
            runs[contender.name].append(run(contender.command))
    return Row(
        name,
        tuple(
            Side(who, [r.seconds for r in of], [r.peak_mib for r in of]) for who, of in runs.items()
        ),
    )


def compare(contenders: Sequence[Contender], how: str) -> None:
    """No number on a wrong result."""
    ours, theirs = (c.output for c in contenders[:2])
    run((sys.executable, "-m", "benchmarks.compare", str(ours), str(theirs), how))


def nf4(setting: Setting) -> Row:
    """In process, both warm, bytes compared first."""
    repeats = str(max(5, setting.repeats))
    times = json.loads(run((sys.executable, "-m", "benchmarks.nf4_in_process", repeats)).stdout)
    sides = Side("lorasurgery", times["ours"]), Side("bitsandbytes", times["peer"])
    return Row("NF4 + double quantization, 4096 x 4096 bf16, in process", sides)


def kernel(name: str, title: str, setting: Setting) -> Row:
    """One of benchmarks.kernels_in_process; the results are compared there."""
    repeats = str(max(5, setting.repeats))
    done = run((sys.executable, "-m", "benchmarks.kernels_in_process", name, repeats))
    times = json.loads(done.stdout)
    return Row(f"{title}, in process", tuple(Side(who, seconds) for who, seconds in times.items()))


def dequantize_kernel(setting: Setting) -> Row:
    return kernel("dequantize", "NF4 to bfloat16, 4096 x 4096", setting)


def merge_kernel(setting: Setting) -> Row:
    """Copying is the floor."""
    return kernel("merge", "merge 8192 x 2048 bf16 at rank 16", setting)


def matvec_kernel(setting: Setting) -> Row:
    return kernel("matvec", "NF4 matvec, 4096 x 4096", setting)


def quantize(setting: Setting) -> Row:
    """File to file, whole processes."""
    ours, theirs = setting.scratch / "nf4", setting.scratch / "nf4-peer"
    contenders = (
        Contender("lorasurgery", (*OURS, "quantize", setting.base, "-o", ours), ours),
        Contender(
            "transformers + bitsandbytes",
            (sys.executable, PEERS / "transformers_quantize.py", setting.base, theirs),
            theirs,
        ),
    )
    row = alternate("quantize to NF4, file to file", contenders, setting.repeats)
    compare(contenders, "same")
    return row


def merge(setting: Setting) -> Row:
    """File to file, whole processes; cp is the floor."""
    return _merge(setting, setting.adapter, "merge a rank-16 LoRA, file to file")


def merge_dora(setting: Setting) -> Row:
    """The same with magnitudes."""
    return _merge(setting, setting.dora, "merge a rank-16 DoRA, file to file")


def _merge(setting: Setting, adapter: Path, name: str) -> Row:
    ours, theirs, copy = (setting.scratch / n for n in ("merged", "merged-peer", "copy"))
    contenders = (
        Contender("lorasurgery", (*OURS, "merge", setting.base, adapter, "-o", ours), ours),
        Contender(
            "PEFT",
            (sys.executable, PEERS / "peft_merge.py", setting.base, adapter, theirs),
            theirs,
        ),
        Contender("cp", ("cp", "-rL", setting.base, copy), copy),
    )
    row = alternate(name, contenders, setting.repeats)
    compare(contenders, "near")
    return row


def prune(setting: Setting) -> Row:
    """One weight's change, from its factors."""
    return _smaller(setting, "prune", "prune a LoRA of rank 64 to 16")


def extract(setting: Setting) -> Row:
    """One weight's change, from two weights."""
    return _smaller(setting, "extract", "extract a LoRA of rank 16")


def _smaller(setting: Setting, which: str, name: str) -> Row:
    size = json.loads((setting.base / "config.json").read_text())["hidden_size"]
    done = run((sys.executable, "-m", "benchmarks.svd_in_process", str(setting.repeats), str(size)))
    times = json.loads(done.stdout)[which]
    sides = Side("lorasurgery", times["ours"]), Side("torch.linalg.svd", times["peer"])
    return Row(f"{name}, one {size} x {size} weight, in process", sides)


def help_(setting: Setting) -> Row:
    """What a user waits for before anything happens."""
    contenders = (
        Contender("lorasurgery", (*OURS, "--help")),
        Contender("import peft", (sys.executable, "-c", "import peft")),
    )
    return alternate("--help", contenders, setting.repeats)


def inspect(setting: Setting) -> Row:
    """Headers alone."""
    peer = PEERS / "safetensors_inspect.py"
    contenders = (
        Contender("lorasurgery", (*OURS, "inspect", setting.base)),
        Contender("transformers + safetensors", (sys.executable, peer, setting.base)),
    )
    return alternate("inspect", contenders, setting.repeats)


ROWS: dict[str, Callable[[Setting], Row]] = {
    "nf4": nf4, "dequantize-kernel": dequantize_kernel, "merge-kernel": merge_kernel,
    "matvec-kernel": matvec_kernel, "quantize": quantize, "merge": merge,
    "merge-dora": merge_dora, "prune": prune, "extract": extract, "help": help_, "inspect": inspect,
}  # fmt: skip
