"""The rows of the table: what is run, and against what."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import adapter_rows, export_rows, train_rows
from benchmarks.processes import run
from benchmarks.racing import OURS, PEERS, Contender, Row, Setting, Side, alternate, compare

LEAST = 15  # runs of what takes milliseconds


def nf4(setting: Setting) -> Row:
    """In process, both warm, bytes compared first."""
    repeats = str(max(LEAST, setting.repeats))
    times = json.loads(run((sys.executable, "-m", "benchmarks.nf4_in_process", repeats)).stdout)
    sides = Side("lorasurgery", times["ours"]), Side("bitsandbytes", times["peer"])
    return Row("NF4 + double quantization, 4096 x 4096 bf16, in process", sides)


def kernel(name: str, title: str, setting: Setting) -> Row:
    """One of benchmarks.kernels_in_process; the results are compared there."""
    repeats = str(max(LEAST, setting.repeats))
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
    size = setting.hidden
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
    "merge-dora": merge_dora, "vera": adapter_rows.convert_vera,
    "adalora": adapter_rows.convert_adalora, "vera-kernel": adapter_rows.vera_in_process,
    "adalora-kernel": adapter_rows.adalora_in_process, "prune": prune, "extract": extract,
    "extract-files": adapter_rows.extract_files, "help": help_, "inspect": inspect,
    "lora": train_rows.lora, "qlora": train_rows.qlora, "paged": train_rows.paged,
    "export-int4": export_rows.export_int4, "decode-int4": export_rows.decode_int4,
    "decode-nf4": export_rows.decode_nf4,
}  # fmt: skip
