"""The rows of what is done to adapters alone: converting one, finding one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.make_adapter import RANK
from benchmarks.processes import run
from benchmarks.racing import OURS, PEERS, Contender, Row, Setting, Side, alternate

ONCE = 1  # a peer takes minutes, tens of times what we take: more runs would say the same


def convert_vera(setting: Setting) -> Row:
    """File to file, whole processes; the peer takes a whole SVD of each change."""
    ours, theirs = setting.scratch / "as-lora", setting.scratch / "as-lora-peer"
    vera, base = setting.of("vera"), setting.part
    rank = str(json.loads((vera / "adapter_config.json").read_text())["r"])
    contenders = (
        Contender(
            "lorasurgery",
            (*OURS, "convert", vera, "--to", "lora", "--base", base, "-o", ours),
            ours,
        ),
        Contender(
            "PEFT's save_as_lora",
            (sys.executable, PEERS / "peft_to_lora.py", base, vera, theirs, rank),
            theirs,
        ),
    )
    row = alternate(f"VeRA to LoRA, {setting.size}, file to file", contenders, ONCE)
    compare_adapters(ours, theirs)
    return row


def convert_adalora(setting: Setting) -> Row:
    """PEFT's conversion refuses these: it is asked, and there is nothing to race."""
    ours, theirs = setting.scratch / "as-lora", setting.scratch / "as-lora-peer"
    adalora, peer = setting.of("adalora"), PEERS / "peft_to_lora.py"
    refused = run((sys.executable, peer, setting.part, adalora, theirs, str(RANK)), codes=(1,))
    assert "TypeError: Some module types" in refused.stderr, refused.stderr
    mine = (*OURS, "convert", adalora, "--to", "lora", "-o", ours)
    name = f"AdaLoRA to LoRA, {setting.size}, file to file; PEFT raises TypeError"
    return alternate(name, (Contender("lorasurgery", mine, ours),), setting.repeats)


def extract_files(setting: Setting) -> Row:
    """File to file, whole processes, both in bfloat16; what is no linear layer is left by both."""
    ours, theirs = setting.scratch / "found", setting.scratch / "found-peer"
    base, tuned, rank = setting.part, setting.of("tuned"), str(RANK)
    command = Path(sys.executable).with_name("mergekit-extract-lora")
    others = ("--exclude-regex", "embed_tokens|lm_head", "--skip-undecomposable")
    contenders = (
        Contender(
            "lorasurgery",
            (*OURS, "extract", base, tuned, "-o", ours, "--rank", rank, "--dtype", "bfloat16"),
            ours,
        ),
        Contender(
            "mergekit-extract-lora",
            (
                command, "--base-model", base, "--model", tuned, "--out-path", theirs,
                "--max-rank", rank, *others,
            ),
            theirs,
        ),
    )  # fmt: skip
    name = f"extract a LoRA of rank {rank}, {setting.size}, file to file"
    row = alternate(name, contenders, ONCE)
    errors = compare_adapters(ours, theirs, base, tuned)
    said = " and ".join(f"{100 * error:.2f} %" for error in errors)
    return Row(f"{name} (errors {said})", row.sides)


def compare_adapters(*paths: Path) -> list[float]:
    """The errors of ours and of theirs; no number on a wrong result."""
    done = run((sys.executable, "-m", "benchmarks.compare_adapters", *paths))
    found: list[float] = json.loads(done.stdout)
    return found


def vera_in_process(setting: Setting) -> Row:
    """Conversion alone, of one layer: ours reads it from disk, the peer has it in memory."""
    return _converted(setting, "vera", "PEFT's convert_to_lora")


def adalora_in_process(setting: Setting) -> Row:
    """What PEFT would do if it did not refuse."""
    return _converted(setting, "adalora", "PEFT's delta and its SVD, by hand")


def _converted(setting: Setting, kind: str, peer: str) -> Row:
    size = str(setting.hidden)
    done = run(
        (sys.executable, "-m", "benchmarks.convert_in_process", kind, str(setting.repeats), size)
    )
    times = json.loads(done.stdout)
    sides = Side("lorasurgery", times["ours"]), Side(peer, times["peer"])
    names = {"vera": "VeRA", "adalora": "AdaLoRA"}
    return Row(f"{names[kind]} to LoRA, one {size} x {size} weight, in process", sides)
