"""The rows of training: LoRA and QLoRA beside PEFT, a step of 4 x 256 tokens; and what paged state moves."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from benchmarks.processes import run
from benchmarks.racing import OURS, Row, Setting, Side

RANK = 8
# how far losses may lie apart: two orders of float32 sums, or of sums rounded to bfloat16
_NEAR, _NEAR_BFLOAT16 = 1e-4, 1e-2


def lora(setting: Setting) -> Row:
    """Both in float32."""
    return _raced(setting, "LoRA", "PEFT", _float32(setting))


def qlora(setting: Setting) -> Row:
    """Both on the same NF4 directory, with products in bfloat16."""
    plain = _float32(setting)
    packed = plain.with_name(f"{plain.name}-nf4")
    if not packed.exists():
        run((*OURS, "quantize", plain, "-o", packed))
    return _raced(setting, "QLoRA", "PEFT + bitsandbytes", packed, "--packed")


def paged(setting: Setting) -> Row:
    """With less and less of AdamW's state in memory, and torch's factors in the end to the last bit."""
    budgets = (math.inf, 0.2, 0.05) if _toy(setting) else (math.inf, 32.0, 8.0)
    contenders: tuple[float | str, ...] = (*budgets, "torch's AdamW")
    sides, digests = [], set()
    for side in contenders:
        kind = ("ours",) if isinstance(side, str) else ("paged", "--budget", str(side))
        done = run((*_command(setting), kind[0], _float32(setting), *kind[1:], "--rank", "16"))
        told = json.loads(done.stdout)
        digests.add(told["digest"])
        sides.append(Side(_paged_name(side, told), told["seconds"], [done.peak_mib]))
    assert len(digests) == 1, digests
    return Row(f"a step of LoRA of rank 16 with paged AdamW, {_size(setting)}", tuple(sides))


def _paged_name(side: float | str, told: dict[str, float]) -> str:
    if isinstance(side, str):
        return side
    moved = told["pages_fetched"] + told["pages_written"]
    if side == math.inf:
        assert not moved
        return "lorasurgery"
    assert told["resident"] <= side * 2**20
    assert moved
    mib = moved * told["page"] / 2**20
    return (
        f"lorasurgery, {side:g} MiB of {told['state'] / 2**20:.1f} in memory: {told['pages_fetched']} + "
        f"{told['pages_written']} pages a step, {mib:.1f} MiB"
    )


def _raced(setting: Setting, title: str, peer: str, base: Path, *flags: str) -> Row:
    """By turns, each in a fresh process; losses are compared first."""
    found: dict[str, list[tuple[dict[str, list[float]], float]]] = {"ours": [], "peer": []}
    for _ in range(setting.repeats):
        for side, runs in found.items():
            done = run((*_command(setting), side, base, *flags))
            runs.append((json.loads(done.stdout), done.peak_mib))
    losses = [runs[0][0]["losses"] for runs in found.values()]
    near = _NEAR_BFLOAT16 if "--packed" in flags else _NEAR
    for one, two in zip(*losses, strict=True):
        assert abs(one - two) < near, losses
    sides = (
        Side(who, [s for told, _ in runs for s in told["seconds"]], [peak for _, peak in runs])
        for who, runs in zip(("lorasurgery", peer), found.values(), strict=True)
    )
    dtype = "bfloat16" if "--packed" in flags else "float32"
    return Row(f"a step of {title} of rank {RANK}, {_size(setting)}, {dtype}", tuple(sides))


def _toy(setting: Setting) -> bool:
    return setting.part.name == "toy"


def _size(setting: Setting) -> str:
    return "toy, 4 x 16 tokens" if _toy(setting) else "SmolLM2-135M, 4 x 256 tokens"


def _command(setting: Setting) -> tuple[str, ...]:
    length = ("--length", "16") if _toy(setting) else ()
    return (sys.executable, "-m", "benchmarks.train_in_process", *length)


def _float32(setting: Setting) -> Path:
    """SmolLM2's sizes with random weights, or the toy, made once."""
    shape = "toy" if _toy(setting) else "smollm2"
    path = setting.part.with_name(f"{shape}-float32")
    if not path.exists():
        made = setting.part if _toy(setting) else setting.part.with_name(shape)
        if not made.exists():
            run((sys.executable, "-m", "benchmarks.make_model", shape, made))
        run((*OURS, "convert-checkpoint", made, "-o", path, "--dtype", "float32"))
    return path
